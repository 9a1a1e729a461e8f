"""Server-sent events: what a stream is made of, and how it ends."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from megatron_multiverse.server.encode import to_json
from megatron_multiverse.server.errors import ApiError

logger = logging.getLogger(__name__)

DONE = b"data: [DONE]\n\n"
PING = b": still here\n\n"
PING_SECONDS = 15.0


_LINE_ENDS = {character.encode(): f"\\u{ord(character):04x}".encode() for character in "\u0085\u2028\u2029"}
"""Characters at which many clients end lines, though events do not, as JSON also writes them."""


def event(data: dict[str, Any]) -> bytes:
    """One event. It has no name: clients of OpenAI's routes take named ones for chunks without choices."""
    text = to_json(data)
    for character, escaped in _LINE_ENDS.items():
        text = text.replace(character, escaped)
    return b"data: " + text + b"\n\n"


class EventStream(Response):
    """Sends events as they come; ends the work behind them when the client goes away or stops reading.

    An error after the first byte becomes an event with the error object, and no `[DONE]` follows: a stream that broke
    must not look like one that is complete.

    Args:
        events: the events, encoded; closed whatever happens.
        idle_timeout: seconds in which the client must take something that waits for it.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes, None], *, idle_timeout: float) -> None:
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._events = events
        self._idle_timeout = idle_timeout

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        writing = asyncio.create_task(self._write(send))
        leaving = asyncio.create_task(disconnected(receive))
        try:
            await asyncio.wait([writing, leaving], return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (writing, leaving):
                task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await writing
            await self._events.aclose()

    async def _write(self, send: Send) -> None:
        async def deliver(message: dict[str, Any]) -> None:
            async with asyncio.timeout(self._idle_timeout):
                await send(message)

        try:
            await deliver({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            try:
                async for data in self._events:
                    await deliver({"type": "http.response.body", "body": data, "more_body": True})
            except ApiError as error:
                await deliver({"type": "http.response.body", "body": event(error.body()), "more_body": True})
            await deliver({"type": "http.response.body", "body": b""})
        except TimeoutError:
            logger.info("a client took nothing for %g seconds; its stream is cut", self._idle_timeout)
        except OSError:
            logger.debug("a client went away")


async def disconnected(receive: Receive) -> None:
    """Wait until the client has gone."""
    while (await receive())["type"] != "http.disconnect":
        pass
