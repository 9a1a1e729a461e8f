"""Checkpoints that are written beside the training: what they hold, when they come into force, and what stops them."""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.dist_checkpointing.strategies import filesystem_async

from megatron_multiverse.errors import CheckpointError
from megatron_multiverse.training import saver
from megatron_multiverse.training.trainer import train
from tests.clocks import TestClock

from .synthetic import SyntheticLoader, config
from .test_trainer import records

BESIDE: dict[str, Any] = {"checkpoint.async_save": True, "checkpoint.keep_last": 0}
"""Checkpoints at steps 3 and 6, the last."""
WAITING = BESIDE | {"checkpoint.async_save": False}
Writer = filesystem_async.FileSystemWriterAsync


class Loader(SyntheticLoader):
    """Calls a function with the number of each microbatch before it is handed out; two of them make a step."""

    def __init__(self, before: Callable[[int], None]) -> None:
        super().__init__()
        self.before = before

    def batch(self, number: int) -> dict[str, torch.Tensor]:
        self.before(number)
        return super().batch(number)


def before_writing(monkeypatch: pytest.MonkeyPatch, function: Callable[[str], None]) -> None:
    """Each writer calls this with the path of its file before it writes it."""
    write = Writer.write_preloaded_data

    def wrapped(transforms: Any, number: int, bucket: Any, *args: Any) -> Any:
        function(bucket[0])
        return write(transforms, number, bucket, *args)

    monkeypatch.setattr(Writer, "write_preloaded_data", wrapped)


@pytest.fixture
def gate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """As long as this file is there, writers do not write."""
    file = tmp_path / "gate"
    file.touch()

    def wait(path: str) -> None:
        while file.exists():
            time.sleep(0.01)

    before_writing(monkeypatch, wait)
    return file


def in_force(folder: Path) -> str:
    file = folder / "latest_checkpointed_iteration.txt"
    return file.read_text().strip() if file.exists() else "nothing"


def content(folder: Path) -> dict[str, bytes]:
    """The files with the state of all checkpoints; not the settings, which differ, nor what holds the folder's name."""
    files = [file for pattern in ("*.distcp", "common.pt") for file in folder.glob(f"iter_*/{pattern}")]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def curve(folder: Path) -> list[tuple[float, ...]]:
    names = ("step", "loss", "grad_norm", "lr", "consumed_samples")
    return [tuple(row[name] for name in names) for row in records(folder, "train")]


def test_files_hold_the_state_of_the_save_though_training_went_on_before_they_were_written(
    tmp_path: Path, gate: Path
) -> None:
    """Byte for byte what a waiting run writes; in force only after the files."""
    seen = []

    def release(number: int) -> None:
        if number == 10:  # two steps have changed the weights since the save
            seen.append((in_force(tmp_path / "beside"), (tmp_path / "beside/iter_0000003.partial").is_dir()))
            gate.unlink()

    train(config(tmp_path / "beside", **BESIDE), Loader(release))
    train(config(tmp_path / "waiting", **WAITING), SyntheticLoader())
    assert seen == [("nothing", True)] and in_force(tmp_path / "beside") == "6"
    waiting = content(tmp_path / "waiting")
    assert content(tmp_path / "beside") == waiting
    assert {name.split("/")[0] for name in waiting} == {"iter_0000003", "iter_0000006"}
    assert curve(tmp_path / "beside") == curve(tmp_path / "waiting")


def test_a_run_goes_on_from_it_bit_for_bit(tmp_path: Path) -> None:
    train(config(tmp_path / "straight", **WAITING), SyntheticLoader())
    for steps in (3, 6):
        train(config(tmp_path / "cut", **BESIDE, train_iters=steps, **{"optim.lr_decay_iters": 6}), SyntheticLoader())
    assert curve(tmp_path / "cut") == curve(tmp_path / "straight")
    assert [row["resumed"] for row in records(tmp_path / "cut", "start")] == [False, True]


def test_times_are_told_and_are_no_time_of_steps(
    tmp_path: Path, gate: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(saver, "time", clock := TestClock(tick=0.001))

    def release(number: int) -> None:
        if number == 10:
            clock.sleep(0.5)
            gate.unlink()

    with caplog.at_level(logging.INFO):
        train(config(tmp_path, **BESIDE), Loader(release))
    first, last = records(tmp_path, "checkpoint")
    assert (first["step"], last["step"]) == (3, 6)
    for row in (first, last):
        assert row["begin_s"] <= row["wait_s"] <= row["save_s"]
        assert all(row[name] > 0 for name in ("gather_s", "plan_s", "fork_s", "write_s", "finish_s"))
        assert row["copy_s"] >= 0  # nothing is copied from a CPU
    assert first["save_s"] > first["wait_s"] + 0.5
    assert last["save_s"] == pytest.approx(last["wait_s"], abs=0.1)  # nothing is left to be trained beside it
    assert f"saved {tmp_path / 'iter_0000003'} in" in caplog.text and "in which training waited" in caplog.text


def test_a_save_that_comes_too_soon_waits_and_says_so(
    tmp_path: Path, gate: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    warn = saver.logger.warning

    def release(*args: Any) -> None:
        warn(*args)
        gate.unlink(missing_ok=True)

    monkeypatch.setattr(saver.logger, "warning", release)
    settings = {"checkpoint.save_interval": 1, "checkpoint.keep_last": 1, "train_iters": 3}
    train(config(tmp_path, **BESIDE | settings), SyntheticLoader())
    assert sorted(file.name for file in tmp_path.glob("iter_*")) == ["iter_0000003"]
    assert [row["step"] for row in records(tmp_path, "checkpoint")] == [1, 2, 3]
    assert "step 2 is to be saved while step 1 is still being written: training waits for it" in caplog.text


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_while_a_checkpoint_is_written_ends_in_one_of_the_last_step(
    tmp_path: Path, gate: Path, number: signal.Signals
) -> None:
    def stop(batch: int) -> None:
        if batch == 8:
            os.kill(os.getpid(), number)
        if batch == 9:
            gate.unlink()

    result = train(config(tmp_path / "cut", **BESIDE), Loader(stop))
    assert (result.step, result.stopped_by, in_force(tmp_path / "cut")) == (5, number.name, "5")
    train(config(tmp_path / "cut", **BESIDE), SyntheticLoader())
    train(config(tmp_path / "straight", **WAITING), SyntheticLoader())
    assert curve(tmp_path / "cut") == curve(tmp_path / "straight")


def full(path: str) -> None:
    raise OSError(28, "No space left on device", path)


def killed(path: str) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("beside", [True, False])
@pytest.mark.parametrize(
    ("fail", "cause"),
    [(full, r"No space left on device: .*__0_0\.distcp'"), (killed, r"__0_0\.distcp ended with exit code -9")],
)
def test_a_writer_that_fails_ends_the_run_with_its_cause_and_the_last_checkpoint_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fail: Callable[[str], None], cause: str, beside: bool
) -> None:
    settings = BESIDE if beside else WAITING
    with monkeypatch.context() as patch:
        before_writing(patch, lambda path: fail(path) if "iter_0000006" in path and path.endswith("0.distcp") else None)
        with pytest.raises(CheckpointError, match=rf"iter_0000006 cannot be written \(.*{cause}\): free space"):
            train(config(tmp_path / "cut", **settings, train_iters=8), SyntheticLoader())
    assert in_force(tmp_path / "cut") == "3"
    assert not (tmp_path / "cut/iter_0000006").exists()
    train(config(tmp_path / "cut", **settings, train_iters=8), SyntheticLoader())
    train(config(tmp_path / "straight", **WAITING, train_iters=8), SyntheticLoader())
    newest = {row[0]: row for row in curve(tmp_path / "cut")}
    assert list(newest.values()) == curve(tmp_path / "straight")


def test_an_error_gives_a_begun_checkpoint_up(tmp_path: Path, gate: Path, caplog: pytest.LogCaptureFixture) -> None:
    """At once: its writers, which would wait for ever, are killed, and the next run clears its folder away."""

    def fail(number: int) -> None:
        if number == 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(config(tmp_path, **BESIDE), Loader(fail))
    assert "the save of" in caplog.text and "iter_0000003 is given up" in caplog.text
    assert in_force(tmp_path) == "nothing" and (tmp_path / "iter_0000003.partial").is_dir()
    gate.unlink()
    train(config(tmp_path, **BESIDE), SyntheticLoader())
    assert sorted(file.name for file in tmp_path.glob("iter_*")) == ["iter_0000003", "iter_0000006"]
