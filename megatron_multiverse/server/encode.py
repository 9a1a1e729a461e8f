"""Answers as JSON text. JSON has no infinity, and log-probabilities can be minus infinity."""

from __future__ import annotations

import json
import math
from typing import Any

from starlette.responses import JSONResponse

LEAST = -9999.0
"""Stands for minus infinity."""


def to_json(data: Any) -> bytes:
    """JSON text in UTF-8, without blanks."""
    try:
        return _encode(data)
    except ValueError:
        return _encode(_finite(data))


class AnswerResponse(JSONResponse):
    """A response that may hold log-probabilities."""

    def render(self, content: Any) -> bytes:
        """The body."""
        return to_json(content)


def _encode(data: Any) -> bytes:
    return json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()


def _finite(data: Any) -> Any:
    if isinstance(data, dict):
        return {name: _finite(value) for name, value in data.items()}
    if isinstance(data, list | tuple):
        return [_finite(value) for value in data]
    return LEAST if isinstance(data, float) and math.isinf(data) else data
