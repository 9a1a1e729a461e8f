from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.api import CheckpointException

from megatron_multiverse import files
from megatron_multiverse.config import CheckpointConfig, ModelConfig
from megatron_multiverse.errors import CheckpointError
from megatron_multiverse.model.gpt import build_gpt_model
from megatron_multiverse.training import checkpoint
from megatron_multiverse.training.checkpoint import CheckpointManager, TrainState, load_state, save_state
from megatron_multiverse.training.one_process import OneProcessEngine
from tests.extra_states import assert_extra_states_load

from .synthetic import SyntheticLoader, config


def new_state(seed: int, tied: bool, **shape: object) -> TrainState:
    import dataclasses

    run = config(Path("unused"), train_iters=10, **{"optim.lr_warmup_iters": 0})
    model_config: ModelConfig = dataclasses.replace(run.model, share_embeddings_and_output_weights=tied, **shape)
    model, loader = build_gpt_model(model_config, seed=seed), SyntheticLoader()
    layers = dataclasses.replace(run.layers, attention_backend="dense")
    return TrainState(OneProcessEngine(run, model, model_config, layers, loader), loader)


def one_step(state: TrainState) -> None:
    state.step += 1
    state.engine.step([next(iter(state.loader))])


@pytest.mark.parametrize("tied", [True, False])
def test_everything_comes_back(tmp_path: Path, tied: bool) -> None:
    state = new_state(0, tied)
    for _ in range(3):
        one_step(state)
    state.consumed_samples = 12
    torch.manual_seed(5)
    save_state(state, tmp_path)
    drawn = torch.rand(3)

    other = new_state(1, tied)
    load_state(other, tmp_path)
    assert torch.equal(torch.rand(3), drawn)
    assert (other.step, other.consumed_samples, other.loader.position) == (3, 12, state.loader.position)
    assert other.engine.scheduler.num_steps == 3
    for _ in range(2):
        one_step(state)
        one_step(other)
    mine, theirs = state.engine, other.engine
    for (name, a), b in zip(mine.model.named_parameters(), theirs.model.parameters(), strict=True):
        assert torch.equal(a, b), name
        for key in ("exp_avg", "exp_avg_sq", "step"):
            assert torch.equal(mine.optimizer.state[a][key], theirs.optimizer.state[b][key]), (name, key)


@pytest.mark.parametrize("qk_layernorm", [True, False])
def test_megatron_with_the_other_spec_finds_its_extra_states(tmp_path: Path, qk_layernorm: bool) -> None:
    save_state(new_state(0, True, qk_layernorm=qk_layernorm, num_layers=2), tmp_path)
    names = ["core_attention", "linear_qkv", "linear_proj", *(["q_layernorm", "k_layernorm"] if qk_layernorm else [])]
    assert_extra_states_load(tmp_path, [*(f"self_attention.{name}" for name in names), "mlp.linear_fc1"], layers=2)
    with pytest.raises(CheckpointException, match="no_such_module"):
        assert_extra_states_load(tmp_path, ["no_such_module"], layers=2)


def write(state: TrainState, folder: Path) -> None:
    (folder / "data").write_text(str(state.step))


def crash(state: TrainState, folder: Path) -> None:
    (folder / "data").write_text("half")
    raise OSError("disk full")


def manager(folder: Path, keep_last: int = 2) -> CheckpointManager:
    return CheckpointManager(CheckpointConfig(save=str(folder), keep_last=keep_last))


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.glob("iter_*"))


def test_a_crash_while_saving_leaves_the_last_checkpoint_in_force(tmp_path: Path) -> None:
    state, checkpoints = new_state(0, True), manager(tmp_path)
    state.step = 5
    checkpoints.save(state, write)
    state.step = 10
    with pytest.raises(OSError, match="disk full"):
        checkpoints.save(state, crash)
    assert manager(tmp_path).latest() == 5
    assert names(tmp_path) == ["iter_0000005", "iter_0000010.partial"]
    manager(tmp_path).save(state, write)  # the next save replaces what the crash left
    assert manager(tmp_path).latest() == 10
    assert names(tmp_path) == ["iter_0000005", "iter_0000010"]
    assert (tmp_path / "iter_0000010" / "data").read_text() == "10"


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
    with pytest.raises(CheckpointError, match="names '7', but there is no such checkpoint"):
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


@pytest.mark.parametrize("again", [False, True], ids=["new step", "step saved before"])
@pytest.mark.parametrize(
    ("module", "name"),
    [(checkpoint.os, "rename"), (checkpoint.shutil, "rmtree"), (files.os, "replace"), (files.os, "fsync")],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_a_crash_at_any_call_leaves_a_whole_checkpoint_in_force(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: object, name: str, again: bool
) -> None:
    """Dies at every rename, removal, replacement and flush of a save in turn; another process then looks."""
    state, crashes = new_state(0, True), 0
    for call in range(20):
        folder = tmp_path / str(call)
        for step in (1, 10) if again else (1, 5):
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
        latest = manager(folder).latest()
        assert latest in (5, 10)
        content = (folder / f"iter_{latest:07d}" / "data").read_text()
        assert content in {"10", "new"} if again else content == {5: "5", 10: "new"}[latest]
        manager(folder, 1).save(state, write_new)
        assert names(folder) == ["iter_0000010"] and manager(folder).latest() == 10
        assert (folder / "iter_0000010" / "data").read_text() == "new"
    assert crashes >= 1 and call < 19


def test_the_new_name_reaches_the_disk_before_the_pointer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    for module, name in ((checkpoint.os, "rename"), (checkpoint, "flush"), (checkpoint, "write_text_atomic")):
        original = getattr(module, name)

        def noted(path: Path, *args: object, name: str = name, original: object = original) -> None:
            events.append(f"{name} {Path(path).name}")
            original(path, *args)  # type: ignore[operator]

        monkeypatch.setattr(module, name, noted)
    state = new_state(0, True)
    state.step = 1
    manager(tmp_path).save(state, write)
    assert events[-3:] == [
        "rename iter_0000001.partial", f"flush {tmp_path.name}", "write_text_atomic latest_checkpointed_iteration.txt",
    ]  # fmt: skip


def write_new(state: TrainState, folder: Path) -> None:
    (folder / "data").write_text("new")
