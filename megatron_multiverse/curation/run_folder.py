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

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_multiverse.curation.exchange import Answer, Request
from megatron_multiverse.files import write_json_atomic
from megatron_multiverse.locked_folder import NAMES, LockedFolder

_FORMAT = 1
_OUTCOME = "outcome.json"
REPORTS = ("rows.jsonl", "set_aside.jsonl", "report.json", "report.md")
"""What a start writes that has asked for nothing, too."""


class RunFolder(LockedFolder):
    """The folder of a curation run; see `LockedFolder`.

    Args:
        path: made if it is missing.
        settings: what decides the questions; another run's are refused.
    """

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        super().__init__(path, {"format": _FORMAT, **settings}, "a curation run")

    def __enter__(self) -> RunFolder:
        super().__enter__()
        for name in ("samples", "batches"):
            (self.path / name).mkdir(exist_ok=True)
        return self

    def is_unused(self) -> bool:
        """Whether nothing has been asked for yet; see `LockedFolder`."""
        empty = ("samples", "batches")
        known = {*empty, *NAMES, *REPORTS}
        return all(file.name in known for file in self.path.iterdir()) and not any(
            any((self.path / name).glob("*")) for name in empty
        )

    def sample(self, name: str) -> SampleState:
        """What is known of one sample."""
        return sample_state(self.path, name)

    def batches(self) -> Iterator[BatchState]:
        """The batches of earlier runs, oldest first."""
        for file in sorted((self.path / "batches").glob("*.json")):
            yield BatchState(file, **json.loads(file.read_text(encoding="utf-8")))

    def new_batch(self, name: str, requests: dict[str, tuple[str, str]]) -> BatchState:
        """Write down what is about to be handed over."""
        batch = BatchState(self.path / "batches" / f"{name}.json", time.time(), requests)
        batch.save()
        return batch


def sample_state(folder: Path, name: str) -> SampleState:
    """What is known of one sample of the run in a folder that another process may have locked for this one."""
    return SampleState(folder / "samples" / name)


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
        self.keep_by_key(request.key, request.stage, answer)

    def keep_by_key(self, key: str, stage: str, answer: Answer) -> None:
        """`keep` where the request itself is not at hand."""
        if key in self.answers:
            return
        self.path.mkdir(exist_ok=True)
        number = len(self.answers) + 1
        kept = {"request": key, "stage": stage, "answer": {**vars(answer), "usage": vars(answer.usage)}}
        write_json_atomic(self.path / f"{number:03d}_{stage}.json", kept, indent=None)
        self.answers[key] = answer

    def outcome(self) -> dict[str, Any] | None:
        """How it ended; None if it has not."""
        file = self.path / _OUTCOME
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None

    def finish(self, outcome: dict[str, Any]) -> None:
        """Keep how it ended."""
        self.path.mkdir(exist_ok=True)
        write_json_atomic(self.path / _OUTCOME, outcome, indent=None)
        self._answers = None

    def _answer_files(self) -> list[Path]:
        return sorted(self.path.glob("[0-9][0-9][0-9]*_*.json")) if self.path.is_dir() else []
