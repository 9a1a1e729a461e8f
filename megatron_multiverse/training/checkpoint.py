"""Training checkpoints: megatron-core's `torch_dist` format, written atomically.

A run folder holds `iter_0000100/`, `iter_0000200/`, ... and `latest_checkpointed_iteration.txt` (Megatron's names).
A checkpoint is written to `iter_0000200.partial`, flushed to disk, renamed, and only then named in the pointer file,
so a crash at any moment leaves a complete checkpoint in force; the next save clears away what a crash left. Where a
step is saved again, its old checkpoint is renamed to `iter_0000200.replaced` until the new one is in force.

megatron-core saves through a process of its own, which imports the main script: a script that trains must have the
`if __name__ == "__main__":` guard, or it would train again inside that process.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron.core import dist_checkpointing

from megatron_multiverse.checkpoints.run_files import ITERATION_GLOB, POINTER_FILE, iteration_folder, step_of
from megatron_multiverse.config import CheckpointConfig
from megatron_multiverse.errors import CheckpointError, ConfigError
from megatron_multiverse.files import flush, write_text_atomic
from megatron_multiverse.model.cpu import device_neutral_cuda
from megatron_multiverse.training.engine import TrainEngine
from megatron_multiverse.training.microbatches import Loader
from megatron_multiverse.training.seeds import rng_state, set_rng_state
from megatron_multiverse.training.signals import hold_signals

logger = logging.getLogger(__name__)


@dataclass
class TrainState:
    """Everything that changes while training, i.e. everything a checkpoint holds."""

    engine: TrainEngine
    loader: Loader
    step: int = 0
    """Optimizer steps done."""
    consumed_samples: int = 0
    """Packed rows trained on so far, over all ranks."""


def save_state(state: TrainState, folder: Path) -> None:
    """Write the state into an empty folder."""
    run = {
        "checkpoint_version": 3.0,
        "iteration": state.step,
        "consumed_samples": state.consumed_samples,
        "rng_state": rng_state(),
        "data_loader": state.loader.state_dict(),
    }
    with device_neutral_cuda(), _quiet(), hold_signals():
        dist_checkpointing.save({**state.engine.state(), **run}, str(folder))


def load_state(state: TrainState, folder: Path) -> None:
    """Read a checkpoint into the state, in place, random generators included."""
    with device_neutral_cuda(), _quiet():
        loaded = dist_checkpointing.load(state.engine.state(is_loading=True), str(folder))
    state.engine.load(loaded, folder)
    state.loader.load_state_dict(loaded["data_loader"])
    set_rng_state(loaded["rng_state"])
    state.step = loaded["iteration"]
    state.consumed_samples = loaded["consumed_samples"]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence torch's FutureWarnings about parts of it that megatron-core still uses."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


class CheckpointManager:
    """Names, atomicity and clean-up of the checkpoints of one run folder."""

    def __init__(self, config: CheckpointConfig) -> None:
        self.config = config
        self.folder = Path(config.save)
        self.folder.mkdir(parents=True, exist_ok=True)

    def folder_of(self, step: int) -> Path:
        """Folder of the checkpoint of a step."""
        return self.folder / iteration_folder(step)

    def _left_over(self, suffix: str) -> Iterator[Path]:
        """Folders that a save which was cut off has left."""
        return self.folder.glob(ITERATION_GLOB + suffix)

    def latest(self) -> int | None:
        """Step of the newest complete checkpoint, or None.

        Raises:
            CheckpointError: the pointer file names a checkpoint that is not there.
        """
        pointer = self.folder / POINTER_FILE
        if not pointer.is_file():
            return None
        self._recover()
        text = pointer.read_text().strip()
        if not text.isdigit() or not self.folder_of(int(text)).is_dir():
            raise CheckpointError(
                f"{pointer} names {text!r}, but there is no such checkpoint: write the number of an existing "
                "iter_ folder into it, or delete it to start over"
            )
        return int(text)

    def resume(self, state: TrainState) -> bool:
        """Load the newest checkpoint, if there is one. Returns True if the run continues.

        Raises:
            ConfigError: there is one, but `checkpoint.resume` is false.
        """
        step = self.latest()
        if step is None:
            return False
        if not self.config.resume:
            raise ConfigError(
                f"{self.folder} already holds a checkpoint (step {step}) and checkpoint.resume is false: "
                "choose another folder in checkpoint.save or set checkpoint.resume to true"
            )
        load_state(state, self.folder_of(step))
        logger.info("resumed from %s", self.folder_of(step))
        return True

    def save(self, state: TrainState, write: Callable[[TrainState, Path], None] = save_state) -> Path:
        """Write a checkpoint of the state's step and make it the newest one.

        `write` is for all ranks of a run, each of which writes its part. What comes before and after it works on
        folders, and is for one rank alone.
        """
        started = time.perf_counter()
        target = self.folder_of(state.step)
        partial = self._make_partial(target)
        write(state, partial)
        self._put_in_force(partial, target, state.step)
        logger.info("saved %s in %.1f s", target, time.perf_counter() - started)
        return target

    def _make_partial(self, target: Path) -> Path:
        """An empty folder for a checkpoint in the making, after what a crash left has been cleared away."""
        self._recover()
        for leftover in (*self._left_over(".partial"), *self._left_over(".replaced")):
            shutil.rmtree(leftover)
        partial = target.with_name(target.name + ".partial")
        partial.mkdir()
        return partial

    def _put_in_force(self, partial: Path, target: Path, step: int) -> None:
        """Give a written checkpoint its name and point at it, so that a crash in between loses nothing."""
        for file in partial.rglob("*"):
            flush(file)
        flush(partial)
        replaced = target.with_name(target.name + ".replaced")
        if target.exists():  # the same step again, e.g. after a run went back to an older checkpoint
            os.rename(target, replaced)
        os.rename(partial, target)
        flush(self.folder)  # the pointer must not reach the disk before the name it holds
        write_text_atomic(self.folder / POINTER_FILE, f"{step}\n")
        if replaced.exists():
            shutil.rmtree(replaced)
        self._prune(step)

    def _recover(self) -> None:
        """Put a replaced checkpoint back if a crash came before the new one of its step had its name."""
        for replaced in self._left_over(".replaced"):
            target = replaced.with_suffix("")
            if not target.exists():
                os.rename(replaced, target)
                flush(self.folder)
                logger.warning("the last save of %s was cut off; the one before it is in force", target)

    def _prune(self, newest: int) -> None:
        """Delete all but the newest `keep_last` checkpoints."""
        if self.config.keep_last == 0:
            return
        steps = sorted(step for f in self.folder.glob(ITERATION_GLOB) if (step := step_of(f.name)) is not None)
        for step in [s for s in steps if s != newest][: max(0, len(steps) - self.config.keep_last)]:
            doomed = (
                self.folder / f"{self.folder_of(step).name}.partial"
            )  # a crash must not leave half of it under its name
            os.rename(self.folder_of(step), doomed)
            shutil.rmtree(doomed)
