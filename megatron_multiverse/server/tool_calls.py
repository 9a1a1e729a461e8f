"""Calls of tools in the text of an answer, as Hermes and Qwen write them, told from the rest while the text comes.

A call is `<tool_call>`, a JSON object with `name` and `arguments`, `</tool_call>`. What is no such object stays text.
"""

from __future__ import annotations

import json
import re
import string
import uuid
from dataclasses import dataclass, field, replace
from typing import Any

from megatron_multiverse.server.body import parse_json
from megatron_multiverse.server.errors import ApiError

OPEN, CLOSE = "<tool_call>", "</tool_call>"

_BLANKS = " \t\r\n"
_HEAD = re.compile(
    r'[ \t\r\n]*\{[ \t\r\n]*"name"[ \t\r\n]*:[ \t\r\n]*("(?:[^"\\\x00-\x1f]|\\.)*")[ \t\r\n]*,'
    r'[ \t\r\n]*"arguments"[ \t\r\n]*:[ \t\r\n]*(?=\{)'
)
"""A call up to its arguments, in the order in which models are trained to write it."""
_HEAD_CHARACTERS = 4096
"""In which a call has to come to its arguments to be told of before it is complete."""
_OUTSIDE_STRINGS = frozenset('{}[],:"+-.' + string.digits + string.ascii_letters + _BLANKS)
_OPENED_BY = {"}": "{", "]": "["}


@dataclass(frozen=True)
class CallPiece:
    """What is new of one call."""

    index: int
    arguments: str
    """The next part of their JSON text."""
    name: str | None = None
    """Of the function; the first piece of a call has it."""

    def whole(self) -> dict[str, Any]:
        """The piece as a call, of which it is all or the beginning."""
        called = {"name": self.name, "arguments": self.arguments}
        return {"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": called}

    def delta(self) -> dict[str, Any]:
        """The piece as a chunk of a stream has it."""
        is_first = self.name is not None
        return {"index": self.index} | (self.whole() if is_first else {"function": {"arguments": self.arguments}})


@dataclass(eq=False)
class _Object:
    """Follows the text of a JSON object as far as is needed to know where it ends; `_read` says whether it is one."""

    done: int = 0
    """Characters that were read."""
    first_end: int | None = None
    """Where the first object or list within it ends."""
    is_complete: bool = False
    is_broken: bool = False
    """Whether the character at `done` can stand in no object."""
    _open: list[str] = field(default_factory=list)
    _in_string: bool = False
    _escaped: bool = False

    def read(self, text: str) -> None:
        """Go on as far as the text goes, or the object."""
        while self.done < len(text) and not self.is_complete:
            self.is_broken = not self._take(text[self.done])
            if self.is_broken:
                return
            self.done += 1

    def _take(self, character: str) -> bool:
        if self._in_string:
            self._in_string = self._escaped or character != '"'
            self._escaped = not self._escaped and character == "\\"
            return character >= " "
        if not self._open:
            if character == "{":
                self._open.append(character)
            return character in "{" + _BLANKS
        if character in _OPENED_BY:
            is_fit = self._open.pop() == _OPENED_BY[character]
            self.is_complete = is_fit and not self._open
            if is_fit and len(self._open) == 1 and self.first_end is None:
                self.first_end = self.done + 1
            return is_fit
        self._in_string = character == '"'
        if character in "{[":
            self._open.append(character)
        return character in _OUTSIDE_STRINGS


class CallReader:
    """Tells the calls in a text from the rest of it, which is content; but for blanks between calls or beside them.

    Args:
        early: whether a call is told of as soon as its name is known, as in streams; else once it is complete. A call
            that breaks off after it was told of stays told as far as it went; else its text is content.
        most: calls that are told of; the text of further ones is dropped.
    """

    def __init__(self, *, early: bool, most: int | None = None) -> None:
        self._early, self._most = early, most
        self._text = ""  # what is not told yet
        self._blanks = ""  # before it; they are content where other text follows
        self._has_said = False  # whether there is content
        self._object: _Object | None = None  # of the call in which the text stands
        self._told: int | None = None  # characters of it that are told of, once its name is
        self._closes = False  # whether a call has just ended, and its end tag may come
        self.num_calls = 0
        """That were found."""

    def push(self, text: str) -> tuple[str, list[CallPiece]]:
        """Take more text; returns what is certain by now: (content, calls)."""
        self._text += text
        content, pieces = "", list[CallPiece]()
        while (found := self._next(pieces)) is not None:
            content += self._said(found)
        return content, pieces

    def finish(self) -> str:
        """What is still content once no more text comes."""
        rest, is_told = self._text, self._told is not None
        if self._object is not None:
            rest = "" if is_told else OPEN + rest
        elif self._closes:
            rest = ""  # an end tag that was cut off
        content = self._said(rest)
        return content if self.num_calls else content + self._blanks

    def _next(self, pieces: list[CallPiece]) -> str | None:
        """Go one step on; returns the content found in it, None where it needs more text."""
        if self._object is not None:
            return self._call(self._object, pieces)
        if self._closes:
            return self._end_tag()
        start = self._text.find(OPEN)
        if start < 0:
            start = len(self._text) - _overlap(self._text)
            content, self._text = self._text[:start], self._text[start:]
            return content or None
        content, self._text = self._text[:start], self._text[start + len(OPEN) :]
        self._object, self._told = _Object(), None
        return content

    def _call(self, found: _Object, pieces: list[CallPiece]) -> str | None:
        before = found.done
        found.read(self._text)
        if self._early and (self._told is not None or before < _HEAD_CHARACTERS):
            self._tell(found, pieces)
        if not (found.is_broken or found.is_complete):
            return None
        text, self._text = self._text[: found.done], self._text[found.done :]
        is_told, self._object, self._told = self._told is not None, None, None
        if not is_told:
            call = None if found.is_broken else _read(text, found)
            if call is None:
                return OPEN + text
            self._add(pieces, CallPiece(self.num_calls, call[1], call[0]))
            self.num_calls += 1
        self._closes = not found.is_broken
        return ""

    def _tell(self, found: _Object, pieces: list[CallPiece]) -> None:
        """Tell of the call, if its name is known, as far as its arguments go."""
        if self._told is None:
            head = _HEAD.match(self._text, 0, min(found.done, _HEAD_CHARACTERS))
            name = _json(head[1]) if head is not None else None
            if head is None or not name:
                return
            self._told = head.end()
            self._add(pieces, CallPiece(self.num_calls, "", name))
            self.num_calls += 1
        end = found.done if found.first_end is None else found.first_end
        if end > self._told:
            self._add(pieces, CallPiece(self.num_calls - 1, self._text[self._told : end]))
            self._told = end

    def _add(self, pieces: list[CallPiece], piece: CallPiece) -> None:
        if self._most is not None and piece.index >= self._most:
            return
        if piece.name is None and pieces and pieces[-1].index == piece.index:
            last = pieces.pop()
            piece = replace(last, arguments=last.arguments + piece.arguments)
        pieces.append(piece)

    def _end_tag(self) -> str | None:
        text = self._text.lstrip(_BLANKS)
        if CLOSE.startswith(text) and text != CLOSE:
            return None
        self._closes = False
        if text.startswith(CLOSE):
            self._text = text[len(CLOSE) :]
        return ""

    def _said(self, text: str) -> str:
        """What of content can be told, blanks only before other text."""
        content = text.rstrip(_BLANKS)
        if not content:
            self._blanks += text
            return ""
        said, self._blanks = self._blanks + content, text[len(content) :]
        begins = self.num_calls and not self._has_said
        self._has_said = True
        return said.lstrip(_BLANKS) if begins else said


def read_calls(text: str, most: int | None) -> tuple[str, list[CallPiece]]:
    """(content, calls) of a complete text; `most`: calls that are told of."""
    reader = CallReader(early=False, most=most)
    content, calls = reader.push(text)
    return content + reader.finish(), calls


def _read(text: str, found: _Object) -> tuple[str, str] | None:
    """(name, JSON of the arguments) of a call; None if the object is none."""
    call = _json(text)
    if not isinstance(call, dict):
        return None
    name, arguments = call.get("name"), call.get("arguments", {})
    if not (isinstance(name, str) and name and isinstance(arguments, dict)):
        return None
    head = _HEAD.match(text)
    if head is None:
        return name, json.dumps(arguments, ensure_ascii=False)
    return str(_json(head[1])), text[head.end() : found.first_end]  # as a stream tells it, whatever comes behind


def _json(text: str) -> Any:
    """What the text is as JSON, None if it is none."""
    try:
        return parse_json(text.encode())
    except ApiError:
        return None


def _overlap(text: str) -> int:
    """Characters at the end of a text that may be the beginning of `OPEN`."""
    start = text.rfind("<")
    return len(text) - start if start >= 0 and OPEN.startswith(text[start:]) else 0
