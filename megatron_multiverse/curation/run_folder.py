"""What a run keeps on the disk, so that it can be killed at any moment and pays for no answer twice.

    OUTPUT/run.json              the settings that decide what is asked, and a hash of the prompts
    OUTPUT/lock                  held by the process that works here
    OUTPUT/samples/ID/           one folder for each sample
        001_outline.json ...     one file for each answer, as it was received, in the order of the questions
        outcome.json             the finished row, or why the sample was set aside
    OUTPUT/batches/NAME.json     a batch: its requests and, once it is known, its id

Every file is written whole or not at all. The state of a sample that is not finished is what follows from its answers.
"""

from __future__ import annotations

import fcntl
import json
import logging
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from megatron_multiverse.curation.exchange import Answer, Request
from megatron_multiverse.errors import ConfigError, DataError
from megatron_multiverse.files import write_json_atomic

logger = logging.getLogger(__name__)

_FORMAT = 1
_SETTINGS, _LOCK, _OUTCOME = "run.json", "lock", "outcome.json"
_PATIENCE_S = 2.0  # a killed run takes a moment to let go


class RunFolder:
    """The folder of a run, locked from `__enter__` to `__exit__`.

    Args:
        path: made if it is missing.
        settings: what decides the questions; another run's are refused.

    Raises:
        ConfigError: on entering: the folder holds something else, or a run with other settings.
        DataError: on entering: another process works here.
    """

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path = path
        self._settings = {"format": _FORMAT, **settings}
        self._lock: IO[str] | None = None

    def __enter__(self) -> RunFolder:
        if self.path.is_dir() and any(self.path.iterdir()) and not (self.path / _LOCK).is_file():
            raise ConfigError(f"--output {self.path} holds something else than a curation run: choose a new folder")
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = open(self.path / _LOCK, "a", encoding="utf-8")
        try:
            self._take_lock(self._lock)
            self._check_settings()
        except BaseException:
            self._lock.close()
            raise
        for name in ("samples", "batches"):
            (self.path / name).mkdir(exist_ok=True)
        return self

    def __exit__(self, *_: object) -> None:
        if self._lock is not None:
            self._lock.close()

    def _take_lock(self, lock: IO[str]) -> None:
        deadline = time.monotonic() + _PATIENCE_S
        while True:
            try:
                return fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise DataError(
                        f"another run works in {self.path}: wait for it, or choose another --output"
                    ) from None
                time.sleep(0.05)

    def _check_settings(self) -> None:
        file = self.path / _SETTINGS
        if not file.is_file():
            write_json_atomic(file, self._settings)
            return
        earlier = json.loads(file.read_text(encoding="utf-8"))
        names = sorted(earlier.keys() | self._settings.keys())
        changed = [name for name in names if earlier.get(name) != self._settings.get(name)]
        if changed:
            lines = ", ".join(f"{n} was {earlier.get(n)!r} and is {self._settings.get(n)!r} now" for n in changed)
            raise ConfigError(f"--output {self.path} holds a run with other settings ({lines}): choose a new folder")

    def sample(self, name: str) -> SampleState:
        """What is known of one sample."""
        return SampleState(self.path / "samples" / name)

    def batches(self) -> Iterator[BatchState]:
        """The batches of earlier runs, oldest first."""
        for file in sorted((self.path / "batches").glob("*.json")):
            yield BatchState(file, **json.loads(file.read_text(encoding="utf-8")))

    def new_batch(self, name: str, requests: dict[str, tuple[str, str]]) -> BatchState:
        """Write down what is about to be handed over."""
        batch = BatchState(self.path / "batches" / f"{name}.json", time.time(), requests)
        batch.save()
        return batch


class BatchState:
    """One batch.

    Args:
        file: where this is written.
        made: when it was about to be handed over, in seconds since 1970.
        requests: custom id -> (sample, key of the request).
        batch: id that the provider has given it; None if it may not have arrived.
        is_fetched: whether its results have been kept.
    """

    def __init__(
        self,
        file: Path,
        made: float,
        requests: dict[str, tuple[str, str]],
        batch: str | None = None,
        is_fetched: bool = False,
    ) -> None:
        self.file = file
        self.made = made
        self.requests = {name: (sample, key) for name, (sample, key) in requests.items()}
        self.batch = batch
        self.is_fetched = is_fetched

    @property
    def name(self) -> str:
        """What its custom ids begin with."""
        return self.file.stem

    def save(self) -> None:
        """Write down what is known now."""
        known = {"made": self.made, "requests": self.requests, "batch": self.batch, "is_fetched": self.is_fetched}
        write_json_atomic(self.file, known, indent=None)

    def forget(self) -> None:
        """The batch has never arrived."""
        self.file.unlink()


class SampleState:
    """The answers and the outcome of one sample.

    Args:
        path: its folder; made with the first answer.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._answers: dict[str, Answer] | None = None

    @property
    def answers(self) -> dict[str, Answer]:
        """Key of the request -> answer, in the order in which they came."""
        if self._answers is None:
            self._answers = {}
            for file in self._answer_files():
                kept = json.loads(file.read_text(encoding="utf-8"))
                self._answers[kept["request"]] = Answer.from_json(kept["answer"])
        return self._answers

    def keep(self, request: Request, answer: Answer) -> None:
        """Keep an answer; it is on the disk when this returns."""
        self.keep_by_key(request.key(), request.stage, answer)

    def keep_by_key(self, key: str, stage: str, answer: Answer) -> None:
        """`keep` where the request itself is not at hand."""
        if key in self.answers:
            return
        self.path.mkdir(exist_ok=True)
        number = len(self.answers) + 1
        kept = {"request": key, "stage": stage, "answer": asdict(answer)}
        write_json_atomic(self.path / f"{number:03d}_{stage}.json", kept)
        self.answers[key] = answer

    def outcome(self) -> dict[str, Any] | None:
        """How it ended; None if it has not."""
        file = self.path / _OUTCOME
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None

    def finish(self, outcome: dict[str, Any]) -> None:
        """Keep how it ended."""
        self.path.mkdir(exist_ok=True)
        write_json_atomic(self.path / _OUTCOME, outcome)
        self._answers = None

    def _answer_files(self) -> list[Path]:
        return sorted(self.path.glob("[0-9][0-9][0-9]*_*.json")) if self.path.is_dir() else []
