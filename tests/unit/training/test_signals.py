from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch

from megatron_multiverse.config import CheckpointConfig
from megatron_multiverse.training import one_process
from megatron_multiverse.training.run_folder import RunFolder
from megatron_multiverse.training.signals import EXIT_CODE_STOPPED, StopSignals, hold_signals
from megatron_multiverse.training.trainer import train
from tests.waiting import PATIENCE_S, wait_until

from .synthetic import SyntheticLoader, config

ROOT = Path(__file__).parents[3]


class WorkerLoader(SyntheticLoader):
    """Takes its batches from a worker process, as the real loader does."""

    def __iter__(self):
        numbers = range(self.position, 10**6)
        data = torch.utils.data.DataLoader(self, batch_size=None, sampler=numbers, num_workers=1)
        for batch in data:
            self.position += 1
            yield batch

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        return self.batch(number)


def train_until_stopped(save: str) -> None:
    """What the process of the tests below does."""
    torch.set_num_threads(1)
    result = train(config(Path(save), train_iters=10**6, **{"checkpoint.save_interval": 3}), WorkerLoader())
    sys.exit(EXIT_CODE_STOPPED if result.model_folder is None else 0)


@pytest.fixture
def temporary() -> Iterator[str]:
    """For the temporary files of processes that are killed. Not below tmp_path: names of sockets must be short."""
    with tempfile.TemporaryDirectory() as folder:
        yield folder


def start(save: Path, temporary: str) -> subprocess.Popen[bytes]:
    """A run that trains until it is stopped, leader of a process group of its own."""
    code = f"from tests.unit.training.test_signals import train_until_stopped; train_until_stopped({str(save)!r})"
    return subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, env=os.environ | {"TMPDIR": temporary}, start_new_session=True
    )


def test_a_signal_to_every_process_of_the_job_saves_and_stops(tmp_path: Path, temporary: str) -> None:
    """The loader's worker and the process that saves get the signal too, as under SLURM, and must survive it."""
    process = start(tmp_path, temporary)
    try:
        pointer = tmp_path / "latest_checkpointed_iteration.txt"
        wait_until(lambda: pointer.exists() or process.poll() is not None, "a checkpoint is there")
        first = int(pointer.read_text())
        os.killpg(process.pid, signal.SIGTERM)
        assert process.wait(PATIENCE_S) == EXIT_CODE_STOPPED
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    last = int(pointer.read_text())
    assert last >= first and (tmp_path / f"iter_{last:07d}" / "metadata.json").is_file()


def test_nothing_outlives_a_run_that_is_killed(tmp_path: Path, temporary: str) -> None:
    """As the kernel does when memory is short. The folder can be used again at once."""
    process = start(tmp_path, temporary)
    pointer = tmp_path / "latest_checkpointed_iteration.txt"
    try:

        def is_far() -> bool:
            return pointer.exists() and int(pointer.read_text()) >= 6

        wait_until(lambda: is_far() or process.poll() is not None, "two checkpoints have been written")
        children = psutil.Process(process.pid).children(recursive=True)
        assert len(children) >= 1  # the loader's worker; Python's resource tracker; while saving, the writers
        process.kill()
        process.wait(PATIENCE_S)
        assert not psutil.wait_procs(children, timeout=PATIENCE_S)[1]
        with RunFolder(CheckpointConfig(save=str(tmp_path))) as run:
            assert run.start_step is not None
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_while_the_final_weights_are_written_does_not_cut_them_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    outside: list[int] = []
    before = signal.signal(number, lambda received, frame: outside.append(received))
    original = one_process.save_model

    def signalled(*args: object) -> None:
        os.kill(os.getpid(), number)
        original(*args)

    monkeypatch.setattr(one_process, "save_model", signalled)
    try:
        result = train(config(tmp_path, train_iters=3), SyntheticLoader())
    finally:
        signal.signal(number, before)
    assert not outside, "the signal reached the process as if nobody were training"
    assert (result.step, result.stopped_by, result.model_folder) == (3, None, tmp_path / "model")
    assert (tmp_path / "model" / "model.safetensors").is_file()


def test_the_flag_is_set_by_this_process_alone_and_handlers_come_back() -> None:
    before = signal.getsignal(signal.SIGUSR1)
    with StopSignals() as stop:
        assert not stop
        with hold_signals():
            # To this thread: one to the process may be taken by another thread, which tells this one a moment later.
            signal.raise_signal(signal.SIGUSR1)
            assert not stop
        assert stop and stop.received == "SIGUSR1"
    assert signal.getsignal(signal.SIGUSR1) is before


def test_a_caller_can_listen_from_before_the_run_until_after_it(tmp_path: Path) -> None:
    """What a program does whose batch system may signal it at any moment."""
    with StopSignals() as stop:
        finished = train(config(tmp_path / "whole"), SyntheticLoader(), stop=stop)
        signal.raise_signal(signal.SIGUSR1)  # after the last save: kills nothing
        stopped = train(config(tmp_path / "none"), SyntheticLoader(), stop=stop)
    assert (finished.step, finished.stopped_by) == (6, None)
    assert (stopped.step, stopped.stopped_by, stopped.model_folder) == (0, "SIGUSR1", None)
