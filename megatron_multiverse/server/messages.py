"""The turns of a chat, as clients send them and as templates take them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron_multiverse.server import refused
from megatron_multiverse.server.body import Fields, parse_json
from megatron_multiverse.server.errors import ApiError, refuse


class TextPart(Fields):
    """A part of a message in OpenAI's longer form."""

    type: str
    text: str | None = None


class CalledFunction(Fields):
    """What a call of a tool names."""

    name: str
    arguments: str | dict[str, Any] | None = None
    """JSON of an object, or the object."""


class ToolCall(Fields):
    """A call of a tool in an earlier turn."""

    function: CalledFunction
    type: str = "function"
    id: str | None = None

    def plain(self) -> dict[str, Any]:
        """The call as templates take it: its arguments an object.

        Raises:
            ApiError: 400, it calls no function, or the arguments are none.
        """
        if self.type != "function":
            raise refuse("messages", f"a call of type {self.type[:40]!r}; only those of type function are served")
        arguments: Any = self.function.arguments or {}
        if isinstance(arguments, str):
            try:
                arguments = parse_json(arguments.encode())
            except ApiError:
                arguments = None
        if not isinstance(arguments, dict):
            raise refuse(
                "messages",
                f"the arguments of a call of {self.function.name[:40]!r} are no JSON object, or one with half of a "
                "character (\\ud800 to \\udfff); give the object, or its JSON text",
            )
        call = {"type": "function", "function": {"name": self.function.name, "arguments": arguments}}
        return call if self.id is None else call | {"id": self.id}


class Message(Fields):
    """One turn."""

    role: str
    content: str | list[TextPart] | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    """vLLM's name for it since 2026."""
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    prompt_token_ids: list[int] | None = None
    generation_token_ids: list[int] | None = None

    def plain(self) -> dict[str, Any]:
        """The turn as templates take it: its content one text.

        Raises:
            ApiError: 400 for parts that are no text, and for fields that are not served.
        """
        for field, value in (self.model_extra or {}).items():
            if value is not None and field in refused.MESSAGE and value not in refused.MESSAGE[field]:
                raise refuse("messages", f"a turn with {field}, which is not served; leave it out")
        content = self.content or ""
        if not isinstance(content, str):
            for part in content:
                if part.type != "text" or part.text is None:
                    raise refuse("messages", f"a part of type {part.type[:40]!r}; only text is served")
            content = "".join(part.text or "" for part in content)
        thought = self.reasoning if self.reasoning_content is None else self.reasoning_content
        calls = [call.plain() for call in self.tool_calls or []]
        others = {
            "reasoning_content": thought,
            "name": self.name,
            "tool_call_id": self.tool_call_id,
            "tool_calls": calls or None,
        }
        return {"role": self.role, "content": content} | {k: v for k, v in others.items() if v is not None}


def plain_turns(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """The turns as templates take them.

    Raises:
        ApiError: 400 for what is not served of a turn, and for results of tools that nobody called.
    """
    called: list[str] = []
    turns = []
    for message in messages:
        turns.append(message.plain())
        if message.tool_calls and message.role != "assistant":
            raise refuse("messages", f"tool_calls in a turn of {message.role[:40]!r}; only the assistant calls tools")
        called += [call.id for call in message.tool_calls or [] if call.id is not None]
        if message.role != "tool":
            continue
        if message.tool_call_id is None and called:
            raise refuse("messages", "a turn of a tool without tool_call_id; give the id of the call that it answers")
        if message.tool_call_id is not None and message.tool_call_id not in called:
            known = ", ".join(called[-10:])[:200] or "none"
            raise refuse(
                "messages",
                f"tool_call_id {message.tool_call_id[:40]!r} answers no call of an earlier turn (ids: {known}); keep "
                "the turn of the assistant that called the tool",
            )
    return turns
