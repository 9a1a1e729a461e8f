"""From the columns of a row to the two texts of a sample: prompt and response.

Text rules are those of the official data script (arXiv 2506.09991, code release): the user turn ends with a sentence
that asks for parallel or for sequential thinking, an answer without "Answer:" gets it in front, and a trajectory
without tags is wrapped in ``<Think>``.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from megatron_multiverse.errors import ConfigError, DataError
from megatron_multiverse.structure import Tag

PARALLEL_SUFFIX = " Think step by step and in parallel before answering."
SEQUENTIAL_SUFFIX = " Think step by step before answering."

ChatTemplate = Literal["auto", "always", "never"]
PromptSuffix = Literal["auto", "parallel", "sequential", "none"]


class RowError(DataError):
    """A row that cannot become a sample; `code` is a short stable reason for the report of rejected rows."""

    def __init__(self, code: str, message: str, *, char_index: int | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.char_index = char_index


@dataclass(frozen=True)
class Columns:
    """Which columns make a sample.

    Attributes:
        prompt: the user's text; None if rows have none.
        response: the whole response, or the trajectory if there is an `answer` column.
        answer: final answer, which follows the trajectory after a blank line.
        is_question: the prompt is a bare question: it gets the suffix and, by default, the chat template.
    """

    response: str
    prompt: str | None = None
    answer: str | None = None
    is_question: bool = False

    @property
    def names(self) -> list[str]:
        """The columns to be read."""
        return [name for name in (self.prompt, self.response, self.answer) if name is not None]


KNOWN_COLUMNS: tuple[Columns, ...] = (
    # Multiverse-1K (which also has the columns of s1K-1.1), then s1K-1.1, then plain rows.
    Columns("deepseek_thinking_trajectory_parallel", "question", "deepseek_attempt", is_question=True),
    Columns("deepseek_thinking_trajectory", "question", "deepseek_attempt", is_question=True),
    Columns("response", "prompt"),
)
TRAJECTORY_COLUMNS = Columns("response", "prompt", is_question=True)
"""What a folder of trajectory files is read as; the prompt may be empty."""


@dataclass(frozen=True)
class PromptStyle:
    """How prompts are written; see `tools/preprocess_data.py --help`."""

    chat_template: ChatTemplate = "auto"
    prompt_suffix: PromptSuffix = "auto"


def resolve_columns(names: Collection[str], json_keys: Sequence[str] | None) -> Columns:
    """Choose the columns: those asked for, else the first known set that is present.

    Args:
        names: columns of the input.
        json_keys: one key (response), two (prompt, response) or three (question, trajectory, answer).

    Raises:
        ConfigError: a key is missing, or no known set of columns is present.
    """
    if json_keys:
        missing = [key for key in json_keys if key not in names]
        if missing:
            raise ConfigError(f"--json-keys names {missing}, but the input has the columns {sorted(names)}")
        if len(json_keys) == 1:
            return Columns(json_keys[0])
        if len(json_keys) == 2:
            return Columns(json_keys[1], json_keys[0])
        if len(json_keys) == 3:
            return Columns(json_keys[1], json_keys[0], json_keys[2], is_question=True)
        raise ConfigError(
            f"--json-keys takes one key (response), two (prompt, response) or three (question, trajectory, "
            f"answer), not {len(json_keys)}"
        )
    for columns in KNOWN_COLUMNS:
        if set(columns.names) <= set(names):
            return columns
    known = "; ".join(", ".join(columns.names) for columns in KNOWN_COLUMNS)
    raise ConfigError(f"the input has the columns {sorted(names)}; known sets: {known}. Name yours with --json-keys")


def build_sample(
    fields: Mapping[str, Any], columns: Columns, style: PromptStyle, render_chat: Callable[[str], str] | None
) -> tuple[str, str]:
    """Prompt and response text of one row.

    Args:
        fields: the row.
        columns: which columns to take.
        style: suffix and chat template.
        render_chat: wraps a user turn in the tokenizer's chat template; None without one.

    Raises:
        RowError: a column is missing, empty or not a string.
    """
    response = _text(fields, columns.response)
    if not response:
        raise RowError("empty", f"column {columns.response!r} is empty")
    is_parallel = Tag.PARALLEL.text in response
    if columns.answer is not None:
        response = _wrap_think(response) + "\n\n" + _answer(_text(fields, columns.answer))
    prompt = _text(fields, columns.prompt) if columns.prompt is not None else ""
    if not prompt:
        return "", response
    prompt += _suffix(style.prompt_suffix, columns.is_question, is_parallel)
    use_template = style.chat_template == "always" or (style.chat_template == "auto" and columns.is_question)
    if use_template and render_chat is not None:
        prompt = render_chat(prompt)
    return prompt, response


def _suffix(choice: PromptSuffix, is_question: bool, is_parallel: bool) -> str:
    if choice == "none" or (choice == "auto" and not is_question):
        return ""
    if choice == "auto":
        return PARALLEL_SUFFIX if is_parallel else SEQUENTIAL_SUFFIX
    return PARALLEL_SUFFIX if choice == "parallel" else SEQUENTIAL_SUFFIX


def _wrap_think(trajectory: str) -> str:
    if trajectory.startswith(Tag.THINK.text):
        return trajectory
    return f"{Tag.THINK.text}\n{trajectory}\n{Tag.END_THINK.text}"


def _answer(answer: str) -> str:
    return answer if "Answer:" in answer else "Answer: " + answer


def _text(fields: Mapping[str, Any], key: str) -> str:
    if key not in fields:
        raise RowError("missing_key", f"no column {key!r}; the row has {sorted(fields)}")
    value = fields[key]
    if not isinstance(value, str):
        raise RowError("not_text", f"column {key!r} holds {type(value).__name__}, not text")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            message = f"column {key!r} holds half of a surrogate pair"
            raise RowError("encoding", message, char_index=error.start) from error
    return value
