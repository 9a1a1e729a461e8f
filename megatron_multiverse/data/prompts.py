"""From the columns of a row to the two texts of a sample: prompt and response.

Text rules are those of the official data script (arXiv 2506.09991, code release): the user turn ends with a sentence
that asks for parallel or for sequential thinking, an answer without "Answer:" gets it in front, and a trajectory
without tags is wrapped in ``<Think>``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from megatron_multiverse.data.turns import (
    TOOL_COLUMNS,
    RowError,
    Turn,
    read_turns,
    refuse_hidden_calls,
    refuse_tools,
    text_of,
    texts_of,
    with_suffix,
)
from megatron_multiverse.errors import ConfigError
from megatron_multiverse.structure import Tag

PARALLEL_SUFFIX = " Think step by step and in parallel before answering."
SEQUENTIAL_SUFFIX = " Think step by step before answering."
SUFFIXES = {"none": "", "parallel": PARALLEL_SUFFIX, "sequential": SEQUENTIAL_SUFFIX}
"""What is put after a prompt, by the name of the choice."""

ChatTemplate = Literal["auto", "always", "never"]
PromptSuffix = Literal["auto", "parallel", "sequential", "none"]


@dataclass(frozen=True)
class Columns:
    """Which columns make a sample.

    Attributes:
        prompt: the user's text; None if rows have none.
        response: the whole response, or the trajectory if there is an `answer` column.
        answer: final answer, which follows the trajectory after a blank line.
        is_question: the prompt is a bare question: it gets the suffix and, by default, the chat template.
        prompt_may_be_empty: whether a row without a prompt is a sample all the same.
        is_conversation: `response` holds turns, see `turns.read_turns`: the last one, of the assistant, is the
            response, and those before it are the prompt, by the chat template.
    """

    response: str
    prompt: str | None = None
    answer: str | None = None
    is_question: bool = False
    prompt_may_be_empty: bool = False
    is_conversation: bool = False

    @property
    def names(self) -> list[str]:
        """The columns that make a sample."""
        return [name for name in (self.prompt, self.response, self.answer) if name is not None]

    @property
    def read(self) -> list[str]:
        """The columns to be read where a row has them; tools that stand in one speak against a conversation."""
        return [*self.names, *TOOL_COLUMNS] if self.is_conversation else self.names


KNOWN_COLUMNS: tuple[Columns, ...] = (
    # Multiverse-1K (which also has the columns of s1K-1.1), then s1K-1.1, then plain rows, then conversations.
    Columns("deepseek_thinking_trajectory_parallel", "question", "deepseek_attempt", is_question=True),
    Columns("deepseek_thinking_trajectory", "question", "deepseek_attempt", is_question=True),
    Columns("response", "prompt"),
    Columns("messages", is_conversation=True),
)
TRAJECTORY_COLUMNS = Columns("response", "prompt", is_question=True, prompt_may_be_empty=True)
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
    raise ConfigError(
        f"the input has the columns {sorted(names)}; known sets: {known}. Name columns of texts with --json-keys, "
        "and call a column of conversations messages, lists of turns with role and content"
    )


def uses_template(style: PromptStyle, columns: Columns) -> bool:
    """Whether prompts are wrapped in the tokenizer's chat template, if it has one."""
    if columns.is_conversation:
        return True
    return style.chat_template == "always" or (style.chat_template == "auto" and columns.is_question)


def build_sample(
    fields: Mapping[str, Any],
    columns: Columns,
    style: PromptStyle,
    render_chat: Callable[[str | list[Turn]], str] | None,
    control_tokens: re.Pattern[str] | None = None,
) -> tuple[str, str]:
    """Prompt and response text of one row.

    Args:
        fields: the row.
        columns: which columns to take.
        style: suffix and chat template.
        render_chat: puts turns, or the text of a user's one turn, into the tokenizer's chat template; None without one.
        control_tokens: matches the tokenizer's control tokens, e.g. ``<|im_end|>``. A question may not hold any: the
            template alone says where a turn ends. Prompts that are taken as they are may have been rendered already.

    Raises:
        RowError: a column is missing, blank or not a string, or the prompt cannot be written.
    """
    if columns.is_conversation:
        return _conversation(fields, columns.response, style, render_chat, control_tokens)
    response = text_of(fields, columns.response)
    is_parallel = Tag.PARALLEL.text in response
    if columns.answer is not None:
        response = _wrap_think(response) + "\n\n" + _answer(text_of(fields, columns.answer))
    if columns.prompt is None:
        return "", response
    prompt = text_of(fields, columns.prompt, may_be_empty=columns.prompt_may_be_empty)
    if not prompt or prompt.isspace():
        return "", response
    use_template = render_chat is not None and uses_template(style, columns)
    if control_tokens is not None and (use_template or columns.is_question):
        _refuse_control_tokens(prompt, columns.prompt, control_tokens)
    prompt += _suffix(style.prompt_suffix, columns.is_question, is_parallel)
    if render_chat is not None and use_template:
        prompt = _render(render_chat, prompt)
    return prompt, response


def _conversation(
    fields: Mapping[str, Any],
    column: str,
    style: PromptStyle,
    render_chat: Callable[[str | list[Turn]], str] | None,
    control_tokens: re.Pattern[str] | None,
) -> tuple[str, str]:
    """Prompt and response of a row of turns. Without a chat template the prompt is the last turn that is answered."""
    if column not in fields:
        raise RowError("missing_key", f"no column {column!r}; the row has {sorted(fields)[:20]}")
    if render_chat is not None:
        refuse_tools(fields)
    turns = read_turns(fields[column], column)
    if len(turns) < 2 or turns[-1]["role"] != "assistant":
        raise RowError(
            "no_answer", f"column {column!r} must end with an answer of the assistant, after a turn before it"
        )
    *asked, last = turns
    answer = _answer_of(last, column)
    suffix = _suffix(style.prompt_suffix, False, Tag.PARALLEL.text in answer)
    if control_tokens is not None:
        for text in (text for turn in asked for text in texts_of(turn)):
            _refuse_control_tokens(text, column, control_tokens)
    if render_chat is None:
        return asked[-1]["content"] + suffix, answer
    asked = with_suffix(asked, suffix)
    prompt = _render(render_chat, asked)
    refuse_hidden_calls(asked, prompt, render_chat)
    return prompt, answer


def _answer_of(turn: Turn, column: str) -> str:
    """The response in the last turn: its thought, where that stands apart, and its content."""
    if "tool_calls" in turn:
        raise RowError(
            "tool_calls",
            f"the last turn of {column!r} calls tools, which are not written out: put the calls into its content, in "
            "the words that the model is to write",
        )
    thought, content = str(turn.get("reasoning_content", "")), str(turn["content"])
    if not thought or thought.isspace():
        return content
    if Tag.THINK.text in content:
        raise RowError(
            "two_thoughts",
            f"the last turn of {column!r} has a thought in its content and another apart from it: leave one of them "
            "out",
        )
    return _wrap_think(thought.strip("\n")) + "\n\n" + content.lstrip("\n")


def _refuse_control_tokens(prompt: str, column: str, control_tokens: re.Pattern[str]) -> None:
    if found := control_tokens.search(prompt):
        raise RowError(
            "control_token",
            f"column {column!r} holds the control token {found.group()}, which only the chat template may write",
            char_index=found.start(),
        )


def _render(render_chat: Callable[[str | list[Turn]], str], prompt: str | list[Turn]) -> str:
    try:
        return render_chat(prompt)
    except Exception as error:  # whatever the code of a template raises is about this prompt
        raise RowError("chat_template", f"the chat template refuses the prompt: {error}") from error


def _suffix(choice: PromptSuffix, is_question: bool, is_parallel: bool) -> str:
    if choice != "auto":
        return SUFFIXES[choice]
    if not is_question:
        return ""
    return PARALLEL_SUFFIX if is_parallel else SEQUENTIAL_SUFFIX


def _wrap_think(trajectory: str) -> str:
    if trajectory.lstrip().startswith(Tag.THINK.text):
        return trajectory
    return f"{Tag.THINK.text}\n{trajectory}\n{Tag.END_THINK.text}"


def _answer(answer: str) -> str:
    return answer if "Answer:" in answer else "Answer: " + answer
