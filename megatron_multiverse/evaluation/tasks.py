"""Problems of the benchmarks of the field, from the hub or from local files of the same columns, and their prompts."""

from __future__ import annotations

import csv
import hashlib
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megatron_multiverse.data.prompts import SUFFIXES
from megatron_multiverse.data.readers import load_dataset, read_rows
from megatron_multiverse.data.sources import open_source
from megatron_multiverse.data.turns import why_a_time
from megatron_multiverse.errors import ConfigError, DataError
from megatron_multiverse.grading import boxes, gold_answer, is_right, stated_answer, stated_letter

logger = logging.getLogger(__name__)

Thinking = Literal["parallel", "sequential", "none"]

_QUESTION = ("problem", "question", "prompt")
_GOLD = ("answer", "expected_answer", "target")
_SOLUTION = ("solution",)
_CORRECT = ("correct answer",)
_INCORRECT = ("incorrect answer 1", "incorrect answer 2", "incorrect answer 3")
_UNREAD = ("choices", "options", "endings")
_LETTERS = "ABCD"

_MATH = r"Put your final answer within \boxed{}."
_CHOICE = 'End with the line "Answer: X", where X is one of the letters A, B, C and D.'


@dataclass(frozen=True)
class Task:
    """Where a benchmark lies on the hub, and what is said after each question."""

    dataset: str
    split: str = "train"
    instruction: str = _MATH
    config: str | None = None


TASKS = {
    "aime24": Task("HuggingFaceH4/aime_2024"),
    "aime25": Task("math-ai/aime25", "test"),
    "aime26": Task("evalscope/aime26", "test"),
    "hmmt25": Task("MathArena/hmmt_feb_2025"),
    "math500": Task("HuggingFaceH4/MATH-500", "test"),
    "gpqa_diamond": Task("Idavidrein/gpqa", instruction=_CHOICE, config="gpqa_diamond"),
}


@dataclass(frozen=True)
class Problem:
    """One question with its gold answer."""

    task: str
    name: str
    """A hash of the question, so that it is the same problem wherever it stands in a file."""
    question: str
    """With its choices and the task's instruction."""
    gold: str
    letters: str = ""
    """Of the choices; empty where the answer is free."""

    def prompt(self, thinking: Thinking) -> str:
        """The turn of the user, with the sentence that models were trained to fork by, or not to."""
        return self.question + SUFFIXES[thinking]

    def grade(self, text: str) -> tuple[str | None, bool]:
        """The answer that a response states, and whether it is right. In the main thread only."""
        if self.letters:
            letter = stated_letter(text, self.letters)
            return letter, letter == self.gold
        answer = stated_answer(text)
        return answer, is_right(self.gold, answer)


def load_problems(task: str, source: str | None, limit: int | None) -> list[Problem]:
    """The problems of a task, in the order of its rows; a question that comes again is left out.

    Args:
        task: a name of `TASKS`, or any other name with a source; such questions get no instruction.
        source: a local file or folder in place of the hub: JSON Lines, Parquet, CSV, or saved by `datasets`.
        limit: only the first so many.

    Raises:
        ConfigError: no such task or file.
        DataError: a row without question or answer, named by its number.
    """
    if task not in TASKS and source is None:
        raise ConfigError(
            f"--tasks {task}: known are {', '.join(TASKS)}; for problems of your own say --data {task}=FILE"
        )
    rows = _hub_rows(TASKS[task]) if source is None else _local_rows(source, TASKS.get(task))
    instruction = TASKS[task].instruction if task in TASKS else ""
    where = source or TASKS[task].dataset
    problems: dict[str, Problem] = {}
    for number, row in enumerate(rows, 1):
        if limit is not None and len(problems) >= limit:
            break
        problem = _problem(task, instruction, row, f"{where}, row {number}")
        if problem.name in problems:
            logger.warning("%s, row %d asks the same question as an earlier row and is left out", where, number)
        problems.setdefault(problem.name, problem)
    if not problems:
        raise DataError(f"{where} holds no problems")
    return list(problems.values())


def _hub_rows(task: Task) -> Iterator[Mapping[str, Any]]:
    try:
        yield from load_dataset(f"{task.dataset}@{task.split}", task.config)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(
            f"{task.dataset} cannot be loaded from the hub ({error}); where there is no network, or no access to a "
            "gated data set, name a local file of the same columns: --data TASK=FILE"
        ) from error


def _local_rows(source: str, task: Task | None) -> Iterator[Mapping[str, Any]]:
    if source.endswith(".csv"):
        try:
            with open(source, encoding="utf-8-sig", newline="") as stream:
                yield from csv.DictReader(stream)
        except UnicodeDecodeError as error:
            raise DataError(
                f"{source} is not UTF-8 (byte {error.object[error.start]:#04x}): save it as UTF-8"
            ) from error
        return
    if not Path(source).exists():
        raise ConfigError(f"--data: {source} does not exist; name a .jsonl, .parquet or .csv file, or a folder of them")
    is_named = Path(source).is_dir() and task is not None and (Path(source) / "dataset_dict.json").is_file()
    for shard in open_source(source, split=task.split if is_named and task else None).shards:
        for row in read_rows(shard):
            if row.error is not None:
                raise DataError(f"{source}, row {row.row}: {row.error}")
            if not row.is_blank:
                yield row.fields


def _problem(task: str, instruction: str, row: Mapping[str, Any], where: str) -> Problem:
    fields = {str(name).strip().lower(): value for name, value in row.items()}
    question = _text(fields, _QUESTION, where)
    name = hashlib.blake2b(question.encode(), digest_size=6).hexdigest()
    if any(column in fields for column in _CORRECT):
        return _choice(task, name, question, instruction or _CHOICE, fields, where)
    _refuse_unread_choices(fields, where)
    if any(column in fields for column in _GOLD):
        gold = _text(fields, _GOLD, where)
    else:
        gold = _text(fields, _SOLUTION, where, asked=_GOLD)
        if not boxes(gold):
            raise DataError(f"{where}: no answer, and no \\boxed{{}} in the solution")
    gold = gold_answer(gold)
    return Problem(task, name, f"{question}\n\n{instruction}" if instruction else question, gold)


def _refuse_unread_choices(fields: Mapping[str, Any], where: str) -> None:
    """Choices in columns of other forms: asked without them, no question could be answered."""
    found = [name for name in _UNREAD if fields.get(name)]
    letters = [letter.lower() for letter in _LETTERS]
    if not found and all(fields.get(letter) not in (None, "") for letter in letters):
        found = letters
    if found:
        raise DataError(
            f"{where}: the choices in {', '.join(found)} are not read; name them Correct Answer and Incorrect Answer 1 "
            "to 3, or write them into the question, with the letter of the right one as answer, and leave "
            f"{'that column' if len(found) == 1 else 'those columns'} out"
        )


def _choice(task: str, name: str, question: str, instruction: str, fields: Mapping[str, Any], where: str) -> Problem:
    """A multiple-choice question. The order of its choices follows from their text alone, because scores of two runs
    with other orders could not be compared."""
    correct = _text(fields, _CORRECT, where)
    choices = [correct, *(_text(fields, (column,), where) for column in _INCORRECT)]
    choices.sort(key=lambda choice: hashlib.sha256(f"{question}\0{choice}".encode()).digest())
    lines = "\n".join(f"{letter}) {choice}" for letter, choice in zip(_LETTERS, choices, strict=True))
    gold = _LETTERS[choices.index(correct)]
    return Problem(task, name, f"{question}\n\n{lines}\n\n{instruction}", gold, _LETTERS)


def _text(
    fields: Mapping[str, Any], names: tuple[str, ...], where: str, *, asked: tuple[str, ...] | None = None
) -> str:
    """The first of these columns that the row has, as a text."""
    for name in names:
        value = fields.get(name)
        if value is None or (isinstance(value, str) and not value.strip()):
            continue
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            found = f"{type(value).__name__}, not a text or a number{why_a_time(value)}"
            raise DataError(f"{where}: column {name!r} holds {found}")
        return str(value).strip()
    raise DataError(f"{where}: none of the columns {', '.join(asked or names)}; the row has {sorted(fields)[:20]}")
