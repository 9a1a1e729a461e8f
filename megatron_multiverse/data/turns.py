"""The turns of a conversation, as rows hold them and as chat templates take them; texts in the cells of a row."""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from megatron_multiverse.errors import DataError

Turn = dict[str, Any]
"""Of a conversation: role and content, and where they are given reasoning_content, name, tool_calls and tool_call_id,
which chat templates read; the server hands them the same."""

TOOL_COLUMNS = ("tools", "functions")
"""The columns of the tools that a conversation may call; "functions" is OpenAI's older name."""


class RowError(DataError):
    """A row that cannot become a sample; `code` is a short stable reason for the report of rejected rows."""

    def __init__(
        self, code: str, message: str, *, token_index: int | None = None, char_index: int | None = None
    ) -> None:
        super().__init__(message)
        self.code = code
        self.token_index = token_index
        self.char_index = char_index


def read_turns(value: Any, column: str) -> list[Turn]:
    """The turns of a conversation, without what no chat template reads of them.

    Args:
        value: the cell.
        column: its name, for messages.

    Raises:
        RowError: it is no list of turns, each with texts; only the last one's content may not be empty.
    """
    if not isinstance(value, list) or not all(isinstance(turn, Mapping) for turn in value):
        raise RowError("not_turns", f"column {column!r} must be a list of turns, each with role and content")
    return [_turn(turn, f"turn {number} of {column!r}", number < len(value)) for number, turn in enumerate(value, 1)]


def refuse_tools(fields: Mapping[str, Any]) -> None:
    """A conversation about tools is another one without them.

    Raises:
        RowError: the row has some.
    """
    for column in TOOL_COLUMNS:
        if _holds(fields.get(column)):
            raise RowError(
                "tools",
                f"column {column!r} is not read, so that the prompt would not show them: give prompts with the tools "
                "in them, as the chat template writes them, in a column of texts",
            )


def with_suffix(turns: list[Turn], suffix: str) -> list[Turn]:
    """The turns with a text put after the last one of the user, or after the last one of all where no user speaks:
    the result of a tool holds what the tool gave and nothing else.

    Args:
        turns: at least one.
        suffix: the text.
    """
    of_user = [number for number, turn in enumerate(turns) if turn["role"] == "user"]
    place = of_user[-1] if of_user else len(turns) - 1
    return [*turns[:place], turns[place] | {"content": turns[place]["content"] + suffix}, *turns[place + 1 :]]


def refuse_hidden_calls(turns: list[Turn], rendered: str, render: Callable[[list[Turn]], str]) -> None:
    """A conversation in which tools were called is another one without their calls.

    Args:
        turns: its turns.
        rendered: what a chat template makes of them.
        render: the chat template.

    Raises:
        RowError: it makes the same of them without the calls.
    """
    without = [{name: value for name, value in turn.items() if name != "tool_calls"} for turn in turns]
    if without == turns:
        return
    try:
        is_hidden = render(without) == rendered
    except Exception:  # a template that misses the calls looks at them; some refuse results that no call came before
        return
    if is_hidden:
        raise RowError(
            "hidden_calls",
            "a turn with tool_calls, which the chat template does not show: take a tokenizer whose template does, or "
            "put the calls into the turn's content",
        )


def texts_of(turn: Turn) -> Iterator[str]:
    """All texts of a turn that a template may write."""
    yield from (turn[name] for name in ("content", "reasoning_content", "name", "tool_call_id") if name in turn)
    if "tool_calls" in turn:
        yield json.dumps(turn["tool_calls"], ensure_ascii=False)


def _turn(turn: Mapping[str, Any], name: str, may_be_empty: bool) -> Turn:
    try:
        calls = _calls(turn)
        is_call = bool(calls) and turn.get("content") is None
        content = "" if is_call else text_of(turn, "content", may_be_empty=may_be_empty or bool(calls))
        read: Turn = {"role": text_of(turn, "role"), "content": content}
        thought = "reasoning" if turn.get("reasoning_content") is None else "reasoning_content"
        for known, given in (("reasoning_content", thought), ("name", "name"), ("tool_call_id", "tool_call_id")):
            if turn.get(given) is not None:
                read[known] = text_of(turn, given, may_be_empty=True)
        return read | ({"tool_calls": calls} if calls else {})
    except RowError as error:
        raise RowError(error.code, f"{name}: {error}", char_index=error.char_index) from error


def _calls(turn: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The calls of a turn as templates take them."""
    if _holds(turn.get("function_call")):
        raise RowError(
            "function_call",
            "function_call is not read: give the call of an earlier turn in tool_calls, as [{'type': 'function', "
            "'function': CALL}], and write that of an answer into its content",
        )
    calls = turn.get("tool_calls")
    if not _holds(calls):
        return []
    if not isinstance(calls, list):
        raise RowError("not_calls", f"tool_calls must be a list of calls, not {type(calls).__name__}")
    return [_call(call) for call in calls]


def _holds(value: Any) -> bool:
    """Whether a cell holds something; some data sets write lists and objects as JSON text, the empty ones too."""
    if isinstance(value, str):
        try:
            return bool(json.loads(value))
        except (ValueError, RecursionError):
            return bool(value.strip())
    if isinstance(value, Mapping):  # tables fill an object that a row has not with empty cells
        return any(cell is not None for cell in value.values())
    return bool(value)


def _call(call: Any) -> dict[str, Any]:
    """A call of a tool as templates take it: its arguments an object."""
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping):
        function = {}
    name, arguments = function.get("name"), function.get("arguments") or {}
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            arguments = None
    if not isinstance(name, str) or not isinstance(arguments, dict):
        raise RowError("not_calls", "tool_calls must be calls of functions, with a name and a JSON object of arguments")
    read = {"type": "function", "function": {"name": name, "arguments": arguments}}
    read |= {} if call.get("id") is None else {"id": call["id"]}
    try:
        json.dumps(read, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise RowError("encoding", "tool_calls hold half of a surrogate pair") from error
    except (TypeError, ValueError, RecursionError) as error:  # e.g. a time, which a Parquet file can hold
        raise RowError("not_calls", f"tool_calls hold what JSON cannot: {error}") from error
    return read


def text_of(fields: Mapping[str, Any], key: str, *, may_be_empty: bool = False) -> str:
    """The text in a cell.

    Raises:
        RowError: there is no such column, or it holds no text; an empty one or white space unless that may be.
    """
    if key not in fields:
        raise RowError("missing_key", f"no column {key!r}; the row has {sorted(fields)[:20]}")
    value = fields[key]
    if not isinstance(value, str):
        raise RowError("not_text", f"column {key!r} holds {type(value).__name__}, not text{why_a_time(value)}")
    if not may_be_empty and (not value or value.isspace()):
        raise RowError("empty", f"column {key!r} is empty" if not value else f"column {key!r} holds white space alone")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            message = f"column {key!r} holds half of a surrogate pair"
            raise RowError("encoding", message, char_index=error.start) from error
    return value


def why_a_time(value: Any) -> str:
    """The rest of a message about a cell that is no text, where the cell is a time; else nothing."""
    if not isinstance(value, datetime.date):
        return ""
    return " (if it is text in a JSON file: the library datasets makes times of ISO dates; give the file as input)"
