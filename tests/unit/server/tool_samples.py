"""Tools for tests."""

from __future__ import annotations

from typing import Any

CHAT = "/v1/chat/completions"
ADD: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds or takes away.",
        "parameters": {
            "type": "object",
            "properties": {
                "a": {"type": "integer", "minimum": 0, "maximum": 99},
                "sign": {"enum": ["plus", "minus"]},
            },
            "required": ["a", "sign"],
            "additionalProperties": False,
        },
    },
}
NOW: dict[str, Any] = {"type": "function", "function": {"name": "now"}}
NAMED = {"type": "function", "function": {"name": "add"}}
CALLED = '<tool_call>\n{"name": "now", "arguments": {"zone": "Asia/Tōkyō"}}\n</tool_call>'
ENDS = {"294": 100, "282": -100}
"""A bias for the end of the text, and against a thought."""


def function(**fields: Any) -> dict[str, Any]:
    """A tool called f."""
    return {"type": "function", "function": {"name": "f", **fields}}
