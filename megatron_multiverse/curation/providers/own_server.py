"""A server of one's own may still load its model when a run begins to ask it: it is waited for."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

from megatron_multiverse.patience import Deadline, Patience, Question

Found = TypeVar("Found")
_STARTING = frozenset({502, 503})


class OwnServer:
    """Asks again while a server says that it starts, until it has answered for the first time.

    The SDKs by themselves try again for half a minute, which is long for a vendor and short for a model that loads.

    Args:
        base_url: of the server; None is a vendor's, for which the SDK's tries are enough.
    """

    def __init__(self, base_url: str | None) -> None:
        self._may_start = base_url is not None
        # Requests that are under way at once wait for one server: one deadline, and each with its own growing pauses.
        self._patience, self._deadline = Patience(str(base_url)), Deadline()

    async def ask(self, call: Callable[[], Awaitable[Found]]) -> Found:
        """What a call of the SDK returns; it is made again while the server starts.

        Args:
            call: makes the request anew each time.

        Raises:
            Exception: the SDK's, where the server has answered before, is not starting, or takes too long to.
        """
        question = self._patience.question(_STARTING, self._deadline)
        while True:
            try:
                found = await call()
            except Exception as error:
                if (pause := self._pause(question, error)) is None:
                    raise
            else:
                self._may_start = False
                return found
            await asyncio.sleep(pause)

    def _pause(self, question: Question, error: Exception) -> float | None:
        """Seconds until the server is asked again; None if the error stands."""
        status, response = getattr(error, "status_code", None), getattr(error, "response", None)
        if not self._may_start or status is None or response is None:
            return None
        if status not in _STARTING:
            # The text is not looked at: that of an answer which was streamed and is closed cannot be read any more.
            self._may_start = False
            return None
        after = response.headers.get("retry-after")
        pause = question.pause(status, response.text, f"it answers with status {status}", after)
        if pause is None:
            self._may_start = False
        return pause
