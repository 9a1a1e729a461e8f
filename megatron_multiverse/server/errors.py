"""Errors as clients read them: one object, whatever went wrong and whoever asks."""

from __future__ import annotations

import math
from typing import Any

TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "invalid_request_error",
    422: "malformed_output_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
}
LONGEST_RETRY = 120
"""The OpenAI client gives up at once where it is told to wait for longer, in seconds."""


class ApiError(Exception):
    """An answer that is an error.

    Args:
        status: HTTP status.
        message: what was given, what is allowed, what to do next. Clients read it: no paths, no texts of exceptions.
        param: the field of the request that is wrong.
        code: short stable name of the fault.
        retry_after: seconds after which to try again.
    """

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None, retry_after: float = 0
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers: dict[str, str] = {}
        if retry_after:
            self.headers["Retry-After"] = str(max(1, min(LONGEST_RETRY, math.ceil(retry_after))))
        if status == 401:
            self.headers["WWW-Authenticate"] = "Bearer"

    def body(self) -> dict[str, Any]:
        """The object: `error` for OpenAI's clients, `message` at the top for Megatron's."""
        error_type = TYPES.get(self.status, "internal_server_error")
        error = {"message": self.message, "type": error_type, "code": self.code, "param": self.param}
        return {"message": self.message, "error": error}


def refuse(param: str, message: str) -> ApiError:
    """A field that cannot be served as given: status 400."""
    return ApiError(400, f"{param}: {message}", param=param, code="invalid_value")


def unavailable(reason: str) -> ApiError:
    """The engine cannot serve now: status 503, with the name of the reason as its code."""
    messages = {
        "loading": "the model is being loaded; try again later",
        "draining": "the server is shutting down; use another one",
        "dead": "the engine has ended; the server must be started again",
        "released": "the engine has given its memory back; resume_memory_occupation takes it again",
        "stalled": "the engine has not answered for a while; try again later",
    }
    return ApiError(503, messages[reason], code=reason, retry_after=0 if reason == "dead" else 5)
