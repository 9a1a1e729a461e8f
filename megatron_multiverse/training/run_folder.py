"""A run folder: which checkpoint is in force, who may write, and what may be deleted.

It holds `iter_0000100/`, `iter_0000200/`, ... and `latest_checkpointed_iteration.txt` (Megatron's names). A checkpoint
is written to `iter_0000200.partial`, flushed to disk, renamed, and only then named in the pointer file, so a crash at
any moment leaves a complete checkpoint in force; the next save clears away what a crash left. Where a step is saved
again, its old checkpoint is renamed to `iter_0000200.replaced` until the new one is in force. The very first one is
named in the pointer before it gets its name: an iter_ folder without a pointer thus means that the pointer was lost.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO

from megatron_multiverse.checkpoints.run_files import (
    ITERATION_GLOB,
    POINTER_FILE,
    iteration_folder,
    step_of,
)
from megatron_multiverse.checksums import check_files, folder_checksums, write_checksums
from megatron_multiverse.config import CheckpointConfig
from megatron_multiverse.errors import CheckpointError, ConfigError
from megatron_multiverse.files import flush, try_lock, write_text_atomic
from megatron_multiverse.parallel.ranks import Ranks
from megatron_multiverse.training.checkpoint import TrainState, begin_saving, explained, load_state
from megatron_multiverse.training.description import RunDescription
from megatron_multiverse.training.own_files import Clearing, foreign_file, is_complete, remove
from megatron_multiverse.training.state_writing import StateWriting

logger = logging.getLogger(__name__)

LOCK_FILE = "run.lock"
_POLL_S = 0.02
"""Seconds between two looks at whether all ranks have written their files."""
Write = Callable[[TrainState, Path], StateWriting]
"""Begins to write a state into a folder, see `begin_saving`."""
_LEFT_OVER = re.compile(r"iter_\d{7,}\.(partial|replaced)")


@dataclass
class _Saving:
    """A save that has begun."""

    step: int
    partial: Path
    writing: StateWriting


class RunFolder:
    """Names, lock, atomicity and clean-up of the checkpoints of one run.

    A context manager: inside the block no other process may enter it for the same folder. Entering finds out which
    checkpoint is in force. With several ranks the first one does all of this, and the others hear of it.

    Args:
        config: where the folder is, and how many checkpoints it keeps.
        ranks: those of the run.

    Raises:
        CheckpointError: on entering: the folder cannot be written, another run has it, or it is not clear which
            checkpoint is in force.
        ConfigError: on entering: it has a checkpoint, but `checkpoint.resume` is false.
    """

    def __init__(self, config: CheckpointConfig, ranks: Ranks | None = None) -> None:
        self.config, self.ranks = config, ranks or Ranks()
        self.folder = Path(config.save)
        self.pointer = self.folder / POINTER_FILE
        self.start_step: int | None = None
        """Step of the checkpoint that was in force on entering."""
        self._lock: IO[str] | None = None
        self._told: set[Path] = set()
        self._saving: _Saving | None = None
        self._clearing: Clearing | None = None
        self.seconds: dict[str, float] = {}
        """Of the phases of the last checkpoint in force, on this rank."""

    def __enter__(self) -> RunFolder:
        self.start_step = self.ranks.first(self._enter)
        return self

    def _enter(self) -> int | None:
        """Lock the folder; the step of the checkpoint in force."""
        with explained(f"{self.folder} cannot be used as run folder", "name another folder in checkpoint.save"):
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = open(self.folder / LOCK_FILE, "a", encoding="utf-8")  # noqa: SIM115 (held for the whole run)
            try:
                if not try_lock(self._lock):
                    raise CheckpointError(
                        f"{self.folder} is in use by another training run: wait for it, stop it, or name another "
                        "folder in checkpoint.save"
                    )
                for leftover in self._left_over("partial", "replaced"):
                    self._check_ours(leftover)
                step = self.latest()
                self._check_resume(step)
            except BaseException:
                self._lock.close()
                raise
        return step

    def look(self) -> None:
        """Find out which checkpoint the pointer names, as on entering, but without the lock and changing nothing: for a
        dry run, beside which the run itself may be at work.

        Raises:
            ConfigError: it has a checkpoint, but `checkpoint.resume` is false.
        """
        text = self.pointer.read_text(errors="replace").strip() if self.pointer.exists() else ""
        self.start_step = int(text) if text.isdigit() else None
        self._check_resume(self.start_step)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._saving is not None:
            logger.warning("the save of %s is given up", self.folder_of(self._saving.step))
            self._saving.writing.abort()
            self._saving = None
        try:
            self._wait_for_clearing()
        except OSError as error:  # the next run clears it away
            logger.warning("an old checkpoint in %s could not be deleted: %s", self.folder, error)
        if self._lock is not None:
            self._lock.close()  # which gives the lock back; the file stays, since another run may be waiting at it

    def _check_resume(self, step: int | None) -> None:
        if step is not None and not self.config.resume:
            raise ConfigError(
                f"{self.folder} already holds a checkpoint (step {step}) and checkpoint.resume is false: "
                "choose another folder in checkpoint.save or set checkpoint.resume to true"
            )

    def folder_of(self, step: int) -> Path:
        """Folder of the checkpoint of a step."""
        return self.folder / iteration_folder(step)

    def steps(self) -> list[int]:
        """Steps of all checkpoints, in order."""
        found = {f: step_of(f.name) for f in self.folder.glob(ITERATION_GLOB) if f.is_dir()}
        return sorted(step for f, step in found.items() if step is not None and f == self.folder_of(step))

    def _left_over(self, *kinds: str) -> list[Path]:
        """Folders that a save which was cut off has left."""
        names = ((f, _LEFT_OVER.fullmatch(f.name)) for f in sorted(self.folder.glob(ITERATION_GLOB)))
        return [f for f, match in names if match is not None and match[1] in kinds]

    def latest(self) -> int | None:
        """Step of the newest complete checkpoint, or None.

        Raises:
            CheckpointError: the pointer file names a checkpoint that is not there, or it is missing beside checkpoints.
        """
        text = self.pointer.read_text(errors="replace").strip() if self.pointer.exists() else None
        self._recover(text)
        steps = self.steps()
        if text is None and not steps:
            return None
        if text is not None and text.isdigit() and int(text) in steps:
            return int(text)
        problem = f"{self.pointer} is missing" if text is None else f"{self.pointer} names {text!r}"
        complete = [step for step in steps if is_complete(self.folder_of(step))]
        remedy = f"write {complete[-1]} into it to go on from its newest complete checkpoint, or " if complete else ""
        raise CheckpointError(
            f"{problem}, but the checkpoints of training steps in {self.folder} are: "
            f"{', '.join(map(iteration_folder, steps)) or 'none'}; {remedy}name another folder in checkpoint.save to "
            "start over"
        )

    def resume(self, state: TrainState, description: RunDescription) -> bool:
        """Load the checkpoint in force, if there is one. Returns True if the run continues.

        Raises:
            CheckpointError: it is damaged.
            ConfigError: it holds another model than `description`.
        """
        if self.start_step is None:
            return False
        folder = self.folder_of(self.start_step)
        description.check(folder)
        self._check_files(folder)
        load_state(state, folder)
        logger.info("resumed from %s", folder)
        return True

    def _check_files(self, folder: Path) -> None:
        """Every rank looks at some of the files; all of them raise if one has found damage."""
        failure = None
        try:
            check_files(folder, part=self.ranks.rank, parts=self.ranks.size)
        except CheckpointError as error:
            failure = str(error)
        if (found := next(filter(None, self.ranks.gather(failure)), None)) is not None:
            raise CheckpointError(f"{found}; or write the number of another iter_ folder into {self.pointer}")

    def save(self, state: TrainState, description: RunDescription, write: Write = begin_saving) -> Path:
        """Write a checkpoint of the state's step and make it the newest one. All ranks call it.

        Raises:
            CheckpointError: it cannot be written; the one before it stays in force.
        """
        self.begin_save(state, description, write)
        return self.finish_save()

    def begin_save(self, state: TrainState, description: RunDescription, write: Write = begin_saving) -> None:
        """Begin to write a checkpoint of the state as it is now. All ranks call it, and each writes its part.

        It comes into force by `finish_save`, which must come before the next one. Leaving the folder before that gives
        it up.

        Raises:
            CheckpointError: it cannot be written; the one before it stays in force.
        """
        target = self.folder_of(state.step)
        with self._explained(target):
            partial = self.ranks.first(lambda: self._make_partial(target, description))
            self._saving = _Saving(state.step, partial, write(state, partial))

    @property
    def saving_step(self) -> int | None:
        """Step of the checkpoint that has begun and is not in force, None if there is none."""
        return None if self._saving is None else self._saving.step

    def is_written(self) -> bool:
        """Whether the files of that checkpoint are written, so that `finish_save` will not wait. All ranks call it."""
        return self._saving is not None and not self.ranks.any(self._saving.writing.is_running())

    def finish_save(self) -> Path:
        """Wait for the files of the checkpoint that has begun, and put it in force. All ranks call it.

        What comes after the files works on folders, and is done by the first rank.

        Raises:
            CheckpointError: it cannot be written; the one before it stays in force.
        """
        assert self._saving is not None, "begin_save comes first"
        saving, target = self._saving, self.folder_of(self._saving.step)
        try:
            with self._explained(target):
                while not self.is_written():  # not in one long collective, which has a timeout
                    time.sleep(_POLL_S)
                started = time.perf_counter()
                parts = self.ranks.gather_to_first(saving.writing.finish())
                known = {name: value for part in parts for name, value in part.items()}
                self.ranks.first(lambda: self._put_in_force(saving.partial, target, saving.step, known))
            self.seconds = {**saving.writing.seconds, "finish_s": time.perf_counter() - started}
        finally:
            saving.writing.abort()  # nothing is left of it unless something else failed
            self._saving = None
        return target

    @staticmethod
    def _explained(target: Path) -> contextlib.AbstractContextManager[None]:
        remedy = (
            "free space or correct the rights, then start again: the run goes on from its last checkpoint, from the "
            "beginning where it has none"
        )
        return explained(f"{target} cannot be written", remedy)

    def _make_partial(self, target: Path, description: RunDescription) -> Path:
        """A folder for a checkpoint in the making, after what a crash left has been cleared away."""
        self._wait_for_clearing()
        self._recover(None)
        for leftover in self._left_over("partial", "replaced"):
            self._delete(leftover)
        partial = target.with_name(target.name + ".partial")
        partial.mkdir()
        description.write(partial)
        return partial

    def _put_in_force(self, partial: Path, target: Path, step: int, known: dict[str, str]) -> None:
        """Give a written checkpoint its name and point at it, so that a crash in between loses nothing.

        Args:
            partial: the checkpoint, not yet by its name.
            target: its name.
            step: its step.
            known: checksums of its files that are known already.
        """
        unknown = folder_checksums(partial, without=known)
        write_checksums(partial, {**known, **unknown})
        for file in partial.rglob("*"):
            flush(file)
        flush(partial)
        is_first = not self.pointer.exists()
        if is_first:
            write_text_atomic(self.pointer, f"{step}\n")  # `_recover` gives the folder its name after a crash
        replaced = target.with_name(target.name + ".replaced")
        if target.exists():  # the same step again, e.g. after a run went back to an older checkpoint
            os.rename(target, replaced)
        os.rename(partial, target)
        flush(self.folder)  # the pointer must not reach the disk before the name it holds
        if not is_first:
            write_text_atomic(self.pointer, f"{step}\n")
        if replaced.exists():
            self._delete(replaced)
        self._prune(step)

    def _recover(self, pointed: str | None) -> None:
        """Give a checkpoint its name where a crash came between the two renames of a save, or before its only one.

        Args:
            pointed: what the pointer file holds.
        """
        for replaced in self._left_over("replaced"):
            if not replaced.with_suffix("").exists():
                self._rename_back(replaced)
        for partial in self._left_over("partial"):
            target = partial.with_suffix("")
            named = pointed is not None and pointed.isdigit() and target == self.folder_of(int(pointed))
            if named and not target.exists() and is_complete(partial):
                self._rename_back(partial)

    def _rename_back(self, folder: Path) -> None:
        target = folder.with_suffix("")
        os.rename(folder, target)
        flush(self.folder)
        logger.warning("the last save of %s was cut off; what was complete is in force", target)

    def _prune(self, newest: int) -> None:
        """Delete all but the newest `keep_last` checkpoints, beside the training if they are written so."""
        if self.config.keep_last == 0:
            return
        steps = self.steps()
        old = [s for s in steps if s != newest][: max(0, len(steps) - self.config.keep_last)]
        aside = [folder for step in old if (folder := self._put_aside(self.folder_of(step))) is not None]
        if self.config.async_save and aside:
            self._clearing = Clearing(aside)
            return
        for folder in aside:
            remove(folder)

    def _delete(self, folder: Path) -> None:
        """Delete a checkpoint of ours; one that holds anything else stays."""
        if (aside := self._put_aside(folder)) is not None:
            remove(aside)

    def _put_aside(self, folder: Path) -> Path | None:
        """Take its name from a checkpoint of ours, since a crash must not leave half of it under that; its folder then.
        None for one that holds anything else: it stays, and the log says so once."""
        if (foreign := foreign_file(folder)) is None:
            if step_of(folder.name) is None:
                return folder
            return folder.rename(folder.with_name(folder.name + ".partial"))
        if folder not in self._told:
            self._told.add(folder)
            logger.warning("%s is not deleted: %s", folder, foreign)
        return None

    def _wait_for_clearing(self) -> None:
        clearing, self._clearing = self._clearing, None
        if clearing is not None:
            clearing.result()

    def _check_ours(self, leftover: Path) -> None:
        if foreign := foreign_file(leftover):
            raise CheckpointError(
                f"{leftover} has the name of a save that was cut off, which the next save would delete, but {foreign}: "
                "move it elsewhere"
            )
