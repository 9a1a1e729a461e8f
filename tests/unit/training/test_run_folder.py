"""A run folder: which checkpoint is in force after a crash anywhere, who may write, what may be deleted."""

from __future__ import annotations

import dataclasses
import errno
import json
import multiprocessing
import os
import queue
import shutil
from pathlib import Path
from typing import ClassVar

import pytest

from megatron_multiverse import files
from megatron_multiverse.config import CheckpointConfig
from megatron_multiverse.errors import CheckpointError, ConfigError
from megatron_multiverse.training import own_files, run_folder
from megatron_multiverse.training.checkpoint import TrainState, begin_saving
from megatron_multiverse.training.description import RunDescription
from megatron_multiverse.training.run_folder import RunFolder

from .synthetic import config
from .test_checkpoint import new_state

RUN = config(Path("unused"))
DESCRIPTION = RunDescription(RUN.model, RUN)


class Folder(RunFolder):
    """Saves with a description at hand."""

    def save(self, state, write):
        self.folder.mkdir(exist_ok=True)
        return super().save(state, DESCRIPTION, lambda state, folder: write(state, folder) or Written())


class Written:
    """Nothing is left to be done in the background."""

    seconds: ClassVar[dict[str, float]] = {}

    def is_running(self) -> bool:
        return False

    def finish(self) -> dict[str, str]:
        return {}

    def abort(self) -> None:
        pass


def write(state: TrainState, folder: Path) -> None:
    (folder / "common.pt").write_text(str(state.step))
    (folder / "metadata.json").write_text("{}")


def crash(state: TrainState, folder: Path) -> None:
    (folder / "common.pt").write_text("half")
    raise OSError("disk full")


def manager(folder: Path, keep_last: int = 2) -> Folder:
    return Folder(CheckpointConfig(save=str(folder), keep_last=keep_last))


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.glob("iter_*"))


def test_a_crash_while_saving_leaves_the_last_checkpoint_in_force(tmp_path: Path) -> None:
    state, checkpoints = new_state(0, True), manager(tmp_path)
    state.step = 5
    checkpoints.save(state, write)
    state.step = 10
    full = r"iter_0000010 cannot be written \(OSError: disk full\): free space.*, from the beginning where it has none$"
    with pytest.raises(CheckpointError, match=full):
        checkpoints.save(state, crash)
    assert manager(tmp_path).latest() == 5
    assert names(tmp_path) == ["iter_0000005", "iter_0000010.partial"]
    manager(tmp_path).save(state, write)  # the next save replaces what the crash left
    assert manager(tmp_path).latest() == 10
    assert names(tmp_path) == ["iter_0000005", "iter_0000010"]
    assert (tmp_path / "iter_0000010" / "common.pt").read_text() == "10"


@pytest.mark.parametrize(("keep_last", "kept"), [(1, [4]), (2, [3, 4]), (0, [1, 2, 3, 4])])
def test_only_the_last_ones_are_kept(tmp_path: Path, keep_last: int, kept: list[int]) -> None:
    state, checkpoints = new_state(0, True), manager(tmp_path, keep_last)
    for step in range(1, 5):
        state.step = step
        checkpoints.save(state, write)
    assert names(tmp_path) == [f"iter_{step:07d}" for step in kept]


def test_going_back_to_an_older_checkpoint_keeps_the_one_just_written(tmp_path: Path) -> None:
    state, checkpoints = new_state(0, True), manager(tmp_path, 1)
    for step in (10, 20, 4):
        state.step = step
        checkpoints.save(state, write)
    assert names(tmp_path) == ["iter_0000004"]
    assert checkpoints.latest() == 4


def test_a_pointer_to_nothing_is_explained(tmp_path: Path) -> None:
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("7\n")
    with pytest.raises(CheckpointError, match=r"names '7', but the checkpoints of training steps in .* are: none"):
        manager(tmp_path).latest()


def test_a_run_goes_on_saving_when_its_last_checkpoint_was_deleted(tmp_path: Path) -> None:
    state, checkpoints = new_state(0, True), manager(tmp_path)
    for step in (1, 2):
        shutil.rmtree(tmp_path / "iter_0000001", ignore_errors=True)
        state.step = step
        checkpoints.save(state, write)
    assert names(tmp_path) == ["iter_0000002"] and checkpoints.latest() == 2


class Crash(BaseException):
    """The process dies here."""


def crash_at(monkeypatch: pytest.MonkeyPatch, module: object, name: str, call: int) -> None:
    """The n-th call (from 0) of a function ends the process instead."""
    original, calls = getattr(module, name), []

    def dies(*args: object, **kwargs: object) -> object:
        calls.append(args)
        if len(calls) == call + 1:
            raise Crash
        return original(*args, **kwargs)

    monkeypatch.setattr(module, name, dies)


@pytest.mark.parametrize("again", [False, True, None], ids=["new step", "step saved before", "first step"])
@pytest.mark.parametrize(
    ("module", "name"),
    [(run_folder.os, "rename"), (os, "unlink"), (os, "rmdir"), (files.os, "replace"), (files.os, "fsync")],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_a_crash_at_any_call_leaves_a_whole_checkpoint_in_force(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: object, name: str, again: bool | None
) -> None:
    """Dies at every rename, removal, replacement and flush of a save in turn; another process then looks."""
    state, crashes = new_state(0, True), 0
    for call in range(30):
        folder = tmp_path / str(call)
        for step in () if again is None else (1, 10) if again else (1, 5):
            state.step = step
            manager(folder).save(state, write)
        state.step = 10
        with monkeypatch.context() as patch:
            crash_at(patch, module, name, call)
            try:
                manager(folder, 1).save(state, write_new)
                break  # fewer calls than this: every one of them has had its turn
            except Crash:
                crashes += 1
        with manager(folder) as left:
            latest = left.start_step
        if latest is None:
            assert again is None
        else:
            content = (folder / f"iter_{latest:07d}" / "common.pt").read_text()
            assert content in {"10", "new"} if again else content == {5: "5", 10: "new"}[latest]
        manager(folder, 1).save(state, write_new)
        assert names(folder) == ["iter_0000010"] and manager(folder).latest() == 10
        assert (folder / "iter_0000010" / "common.pt").read_text() == "new"
    assert call < 29 and (crashes >= 1 or (again is None and name in ("unlink", "rmdir")))


def test_the_new_name_reaches_the_disk_before_the_pointer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    for module, name in ((run_folder.os, "rename"), (run_folder, "flush"), (run_folder, "write_text_atomic")):
        original = getattr(module, name)

        def noted(path: Path, *args: object, name: str = name, original: object = original) -> None:
            events.append(f"{name} {Path(path).name}")
            original(path, *args)  # type: ignore[operator]

        monkeypatch.setattr(module, name, noted)
    state = new_state(0, True)
    for state.step in (0, 1):
        manager(tmp_path).save(state, write)
    assert events[-3:] == [
        "rename iter_0000001.partial", f"flush {tmp_path.name}", "write_text_atomic latest_checkpointed_iteration.txt",
    ]  # fmt: skip


def write_new(state: TrainState, folder: Path) -> None:
    (folder / "common.pt").write_text("new")
    (folder / "metadata.json").write_text("{}")


def save_steps(folder: Path, *steps: int, keep_last: int = 0) -> None:
    state = new_state(0, True)
    for state.step in steps:
        manager(folder, keep_last).save(state, write)


def open_folder(folder: Path) -> str:
    """What another process meets there."""
    try:
        with manager(folder):
            return "entered"
    except CheckpointError as error:
        return str(error)


def test_a_second_run_in_the_folder_is_refused_until_the_first_is_gone(tmp_path: Path) -> None:
    with multiprocessing.get_context("fork").Pool(1) as pool:
        with manager(tmp_path):
            assert "is in use by another training run" in pool.apply(open_folder, (tmp_path,))
        assert pool.apply(open_folder, (tmp_path,)) == "entered"


@pytest.mark.parametrize("resume", [True, False])
def test_checkpoints_without_a_pointer_are_refused_and_the_newest_complete_one_is_named(
    tmp_path: Path, resume: bool
) -> None:
    save_steps(tmp_path, 2, 4, 6)
    (tmp_path / "iter_0000006" / "metadata.json").unlink()
    (tmp_path / "latest_checkpointed_iteration.txt").unlink()
    settings = CheckpointConfig(save=str(tmp_path), resume=resume)
    with pytest.raises(CheckpointError, match=r"is missing, but .* iter_0000002, iter_0000004, iter_0000006; write 4"):
        RunFolder(settings).__enter__()
    assert names(tmp_path) == ["iter_0000002", "iter_0000004", "iter_0000006"]


def test_only_what_this_trainer_wrote_is_deleted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_steps(tmp_path, 1, 2, 3)
    (tmp_path / "iter_0000001" / "notes.txt").write_text("mine")
    (tmp_path / "iter_0000002" / "train_config.json").unlink()  # as one of Megatron's own checkpoints
    (tmp_path / "iter_7").mkdir()
    (tmp_path / "iter_best.partial").mkdir()
    save_steps(tmp_path, 4, 5, keep_last=1)
    assert names(tmp_path) == ["iter_0000001", "iter_0000002", "iter_0000005", "iter_7", "iter_best.partial"]
    assert "iter_0000001 is not deleted: it holds notes.txt" in caplog.text
    assert "iter_0000002 is not deleted: it has no train_config.json" in caplog.text


@pytest.mark.parametrize("name", ["iter_0000009.partial", "iter_0000009.replaced"])
def test_a_folder_with_the_name_of_a_cut_off_save_but_other_files_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / name / "rows.jsonl").write_text("mine")
    with pytest.raises(CheckpointError, match=rf"{name} has the name .* it holds rows.jsonl.*: move it elsewhere"):
        manager(tmp_path).__enter__()
    assert (tmp_path / name / "rows.jsonl").read_text() == "mine"


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(
        CheckpointError, match=r"file cannot be used as run folder \(FileExistsError: .*\): name another"
    ):
        manager(tmp_path / "file").__enter__()


@pytest.mark.parametrize(
    ("field", "value"),
    [("rotary_base", 1e4), ("vocab_size", 64), ("layernorm_epsilon", 1e-5), ("qk_layernorm", True)],
)
def test_another_model_is_refused_by_name(tmp_path: Path, field: str, value: object) -> None:
    """Some of these have tensors of the same shapes, so nothing else would notice."""
    DESCRIPTION.write(tmp_path)
    DESCRIPTION.check(tmp_path)
    other = dataclasses.replace(DESCRIPTION, model=dataclasses.replace(RUN.model, **{field: value}))
    with pytest.raises(ConfigError, match=rf"another model \({field} .* there, {value!r} here\)"):
        other.check(tmp_path)
    (tmp_path / "model_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"model_config.json cannot be read"):
        DESCRIPTION.check(tmp_path)


def test_settings_that_change_numbers_are_warned_of_and_others_are_not(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    DESCRIPTION.write(tmp_path)
    quiet = {"checkpoint.keep_last": 7, "log.log_interval": 3, "data.num_workers": 0, "train_iters": 9}
    quiet |= {"data.data_prefixes": ["moved"]}  # the position in the data knows what they hold
    RunDescription(RUN.model, config(tmp_path, **quiet)).check(tmp_path)
    assert not caplog.messages
    loud = {"optim.weight_decay": 0.5, "optim.clip_grad": 2.0, "optim.adam_beta2": 0.9, "dtype": "bf16"}
    loud |= {"data.global_batch_size": 8, "deterministic": True, "layers.attention_backend": "dense"}
    RunDescription(RUN.model, config(tmp_path, **loud)).check(tmp_path)
    assert len(caplog.messages) == len(loud)
    for name, value in loud.items():
        assert any(f"ran with {name} " in line and f"goes on with {value}" in line for line in caplog.messages)


def test_a_setting_that_is_newer_than_the_checkpoint_is_warned_of_only_where_it_is_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    DESCRIPTION.write(tmp_path)
    file = tmp_path / "train_config.json"
    saved = json.loads(file.read_text())
    del saved["optim"]["implementation"], saved["deterministic"]
    file.write_text(json.dumps(saved))
    DESCRIPTION.check(tmp_path)
    assert not caplog.messages
    RunDescription(RUN.model, config(tmp_path, **{"optim.implementation": "apex"})).check(tmp_path)
    (line,) = caplog.messages
    assert "ran with optim.implementation nothing, this run goes on with apex" in line


def test_a_flipped_bit_is_noticed_before_anything_is_loaded(tmp_path: Path) -> None:
    state = new_state(0, True)
    state.step = 3
    with manager(tmp_path) as run:
        run.save(state, begin_saving)
    file = next((tmp_path / "iter_0000003").glob("*.distcp"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with (
        manager(tmp_path) as run,
        pytest.raises(CheckpointError, match=rf"{file.name} is damaged.* another iter_ folder into"),
    ):
        run.resume(new_state(1, True), DESCRIPTION)


@pytest.fixture
def removals(monkeypatch: pytest.MonkeyPatch) -> queue.Queue[OSError | None]:
    """Old checkpoints are deleted only when something is put here; if it is an error, that comes of it."""
    orders: queue.Queue[OSError | None] = queue.Queue()
    remove = own_files.remove

    def wait(folder: Path) -> None:
        if (error := orders.get(timeout=60)) is not None:
            raise error
        remove(folder)

    monkeypatch.setattr(own_files, "remove", wait)
    return orders


def test_with_async_save_old_checkpoints_are_deleted_beside_the_training(
    tmp_path: Path, removals: queue.Queue[OSError | None]
) -> None:
    """Their names are gone at once, their files before the next checkpoint takes space and when the run ends."""
    state = new_state(0, True)
    with Folder(CheckpointConfig(save=str(tmp_path), keep_last=1, async_save=True)) as run:
        for state.step in (1, 2):
            run.save(state, write)
        assert run.latest() == 2 and names(tmp_path) == ["iter_0000001.partial", "iter_0000002"]
        removals.put(None)
        state.step, seen = 3, []

        def look_and_write(state: TrainState, folder: Path) -> None:
            seen.extend(names(tmp_path))
            write(state, folder)

        run.save(state, look_and_write)
        assert seen == ["iter_0000002", "iter_0000003.partial"]
        removals.put(None)
    assert names(tmp_path) == ["iter_0000003"]


def test_an_old_checkpoint_that_cannot_be_deleted_stops_the_next_save_and_not_the_end_of_a_run(
    tmp_path: Path, removals: queue.Queue[OSError | None], caplog: pytest.LogCaptureFixture
) -> None:
    state = new_state(0, True)
    settings = CheckpointConfig(save=str(tmp_path), keep_last=1, async_save=True)
    with Folder(settings) as run:
        for state.step in (1, 2):
            run.save(state, write)
        removals.put(OSError(errno.EROFS, "Read-only file system"))
        state.step = 3
        with pytest.raises(CheckpointError, match=r"iter_0000003 cannot be written \(OSError: .*Read-only file system"):
            run.save(state, write)
    assert not caplog.messages
    with Folder(settings) as run:
        run.save(state, write)  # which clears away what is left of step 1
        removals.put(OSError(errno.EROFS, "Read-only file system"))
    assert "could not be deleted" in caplog.text
    assert run.latest() == 3 and names(tmp_path) == ["iter_0000002.partial", "iter_0000003"]
