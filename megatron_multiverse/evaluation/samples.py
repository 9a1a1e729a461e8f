"""Which answers a run asks for, and the finished ones on the disk: one line each, whole or not there."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from megatron_multiverse.errors import DataError
from megatron_multiverse.evaluation.tasks import Problem, Thinking
from megatron_multiverse.files import naming, write_line, write_text_atomic

logger = logging.getLogger(__name__)

SAMPLES = "samples.jsonl"


class Key(NamedTuple):
    """What tells one answer of a run from the others."""

    task: str
    problem: str
    thinking: Thinking
    budget: int | None
    seed: int


@dataclass(frozen=True)
class Job:
    """An answer to ask for."""

    key: Key
    problem: Problem

    @property
    def prompt(self) -> str:
        """The turn of the user."""
        return self.problem.prompt(self.key.thinking)


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What came back, and what it cost."""

    text: str
    finish_reason: str
    tokens: int
    """Of all branches."""
    critical_tokens: int
    """On the longest chain."""
    decode_steps: int
    """Forward passes that gave the answer a token."""
    blocks: int
    paths: int
    malformed: dict[str, int]
    seconds: float
    """From asking to having it, while others were under way (`concurrency`)."""


@dataclass(frozen=True, kw_only=True)
class Sample(Answer):
    """A graded answer: one line of samples.jsonl."""

    task: str
    problem: str
    thinking: Thinking
    budget: int | None
    seed: int
    concurrency: int
    """Answers under way at once, which `seconds` depends on."""
    gold: str
    answer: str | None
    """As the text states it; None if it states none."""
    correct: bool
    prompt: str

    @property
    def key(self) -> Key:
        """See `Key`."""
        return Key(self.task, self.problem, self.thinking, self.budget, self.seed)


def make_jobs(
    problems: Sequence[Problem], thinking: Sequence[Thinking], budgets: Sequence[int | None], num_seeds: int
) -> list[Job]:
    """All answers of a run, seed after seed: an interrupted run has most problems of the first seeds."""
    return [
        Job(Key(problem.task, problem.name, how, budget, seed), problem)
        for seed, budget, how, problem in product(range(num_seeds), budgets or [None], thinking, problems)
    ]


class SampleLog:
    """Appends finished samples to a file; each is on the disk when `append` returns.

    Args:
        path: samples.jsonl of the run. What a killed run left of a last line is cut off.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        if path.is_file():
            content = path.read_bytes()
            whole = content.rfind(b"\n") + 1
            if whole < len(content):
                os.truncate(path, whole)
        self.samples = {sample.key: sample for sample in read_samples(path)} if path.is_file() else {}

    def hold_against(self, jobs: Sequence[Job]) -> None:
        """Grade answers anew whose right answer is another one now, as after a correction of --data.

        In the main thread only.

        Raises:
            DataError: a problem is asked in other words now; the message names it.
        """
        changed = 0
        for job in jobs:
            sample = self.samples.get(job.key)
            if sample is None or (sample.prompt, sample.gold) == (job.prompt, job.problem.gold):
                continue
            if sample.prompt != job.prompt:
                raise DataError(
                    f"{self._path} has answers to {sample.prompt[:300]!r}, which --tasks and --data ask as "
                    f"{job.prompt[:300]!r} now: choose another --output, or the data of then"
                )
            answer, correct = job.problem.grade(sample.text)
            self.samples[job.key] = replace(sample, gold=job.problem.gold, answer=answer, correct=correct)
            changed += 1
        if changed:
            lines = (json.dumps(asdict(sample), ensure_ascii=False) + "\n" for sample in self.samples.values())
            write_text_atomic(self._path, "".join(lines))
            logger.warning("%d answers are graded anew: their right answer is another one now", changed)

    def append(self, sample: Sample) -> None:
        """Add one."""
        with naming(self._path), open(self._path, "a", encoding="utf-8") as stream:
            write_line(stream, json.dumps(asdict(sample), ensure_ascii=False))
            os.fsync(stream.fileno())
        self.samples[sample.key] = sample


def read_samples(path: Path) -> Iterator[Sample]:
    """The finished samples of a run.

    Raises:
        DataError: no such file, or a line that is no sample.
    """
    if not path.is_file():
        hint = f", such as {path.parent.parent}" if path.parent.is_file() else ""
        raise DataError(f"{path}: no such file; name the --output folder of tools/evaluate.py{hint}")
    with open(path, encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                fields: dict[str, Any] = json.loads(line)
                yield Sample(**fields)
            except (ValueError, TypeError) as error:
                raise DataError(f"{path}, line {number} is no sample ({error}): delete the line") from error
