"""Answers as JSON text. JSON has no infinity, and log-probabilities can be minus infinity."""

from __future__ import annotations

import json
import math
from typing import Any

import pydantic_core
from starlette.responses import JSONResponse

LEAST = -9999.0
"""Stands for minus infinity."""


def to_json(data: Any) -> bytes:
    """JSON text in UTF-8, without blanks.

    By pydantic's writer, which is faster than Python's: all streams wait meanwhile.

    Raises:
        ValueError: a number that is none (NaN), or half of a character.
    """
    text = pydantic_core.to_json(data)
    if b"Infinity" in text or b"NaN" in text:  # such numbers, which it writes as they are, or a text that says so
        return json.dumps(_finite(data), ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
    return text


class AnswerResponse(JSONResponse):
    """A response that may be large, or hold log-probabilities."""

    def render(self, content: Any) -> bytes:
        """The body."""
        return to_json(content)


def _finite(data: Any) -> Any:
    if isinstance(data, dict):
        return {name: _finite(value) for name, value in data.items()}
    if isinstance(data, list | tuple):
        return [_finite(value) for value in data]
    return LEAST if isinstance(data, float) and math.isinf(data) else data
