"""How long a server that is starting, restarting or busy is asked again, for all that talk to one."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Collection

logger = logging.getLogger(__name__)

PATIENCE_S = 300.0
"""Longest time of one wait, from the first answer that is waited for."""
BUSY = frozenset({429, 502, 503})
"""What a server says that is busy, loads its model or gets ready, and what a proxy says of one that is not up."""
STARTING = BUSY | {504}
"""The same of a question that is answered at once: for one that takes long, 504 means that a proxy waits less than
that."""
SHORTEST_PAUSE_S = 0.5
"""Also where a server says `Retry-After: 0`."""
_LONGEST_PAUSE_S = 30.0


class Deadline:
    """Of one wait, for one question or several: it begins with the first answer that is waited for."""

    def __init__(self) -> None:
        self._began: float | None = None

    def waited(self) -> float:
        """Seconds since it began; the first call begins it."""
        now = time.monotonic()
        if self._began is None:
            self._began = now
        return now - self._began


class Patience:
    """When one server is asked again.

    Args:
        server: what it is called in messages.
    """

    def __init__(self, server: str) -> None:
        self.server = server
        self._told_at = -PATIENCE_S

    def question(self, statuses: Collection[int] = STARTING, deadline: Deadline | None = None) -> Question:
        """A question that is about to be asked.

        Args:
            statuses: those that pass by.
            deadline: what it shares with other questions; default is one of its own.
        """
        return Question(self, statuses, deadline or Deadline())

    def tell(self, said: str) -> None:
        """Say that it is waited for, once for all questions that are under way."""
        now = time.monotonic()
        if now - self._told_at >= PATIENCE_S:
            self._told_at = now
            logger.warning("%s: %s; it is asked again for up to %g s", self.server, said, PATIENCE_S)


class Question:
    """One question, until it has an answer that stands."""

    def __init__(self, patience: Patience, statuses: Collection[int], deadline: Deadline) -> None:
        self._patience, self._statuses, self._deadline = patience, statuses, deadline
        self._pause = 1.0

    def pause(self, status: int, text: str, said: str, retry_after: str | None = None) -> float | None:
        """Seconds until it is asked again; None if the answer stands.

        Args:
            status: of the answer.
            text: its body; a server of this project whose engine has died says so there, and never gets ready.
            said: the answer, for a person.
            retry_after: its header of that name.
        """
        if status not in self._statuses or _is_dead(text) or (waited := self._deadline.waited()) >= PATIENCE_S:
            return None
        if status != 429:
            self._patience.tell(said)
        asked = float(retry_after) if retry_after and retry_after.isdecimal() else self._pause
        self._pause *= 2
        return min(max(asked, SHORTEST_PAUSE_S), _LONGEST_PAUSE_S, PATIENCE_S - waited)

    def given_up(self, status: int, text: str) -> str | None:
        """What to add to the message of an answer that stands, where that ends the wait for the server: it is still
        starting, or never gets ready. None of any other answer, which the caller understands best."""
        if status not in self._statuses:
            return None
        if _is_dead(text):
            return ""
        return f", still so after {self._deadline.waited():.0f} s: see what keeps it, then the same command asks again"


def _is_dead(text: str) -> bool:
    try:
        return bool(json.loads(text)["error"]["code"] == "dead")
    except (ValueError, KeyError, TypeError):
        return False
