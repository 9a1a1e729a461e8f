"""How long a server that is starting, restarting or busy is asked again, for all that talk to one."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Collection

logger = logging.getLogger(__name__)

PATIENCE_S = 300.0
"""Longest time that one question is asked again."""
BUSY = frozenset({429, 502, 503})
"""What a server says that is busy, loads its model or gets ready, and what a proxy says of one that is not up."""
STARTING = BUSY | {504}
"""The same of a question that is answered at once: for one that takes long, 504 means that a proxy waits less than
that."""
_LONGEST_PAUSE_S = 30.0


class Patience:
    """When one server is asked again.

    Args:
        server: what it is called in messages.
    """

    def __init__(self, server: str) -> None:
        self.server = server
        self._told_at = -PATIENCE_S

    def question(self, statuses: Collection[int] = STARTING) -> Question:
        """A question that is about to be asked; `statuses` are those that pass by."""
        return Question(self, statuses)

    def tell(self, said: str) -> None:
        """Say that it is waited for, once for all questions that are under way."""
        now = time.monotonic()
        if now - self._told_at >= PATIENCE_S:
            self._told_at = now
            logger.warning("%s: %s; it is asked again for up to %g s", self.server, said, PATIENCE_S)


class Question:
    """One question, until it has an answer that stands."""

    def __init__(self, patience: Patience, statuses: Collection[int]) -> None:
        self._patience, self._statuses = patience, statuses
        self._began, self._pause = time.monotonic(), 1.0

    def pause(self, status: int, text: str, said: str, retry_after: str | None = None) -> float | None:
        """Seconds until it is asked again; None if the answer stands.

        Args:
            status: of the answer.
            text: its body; a server of this project whose engine has died says so there, and never gets ready.
            said: the answer, for a person.
            retry_after: its header of that name.
        """
        waited = time.monotonic() - self._began
        if status not in self._statuses or waited >= PATIENCE_S or _is_dead(text):
            return None
        if status != 429:
            self._patience.tell(said)
        asked = float(retry_after) if retry_after and retry_after.isdecimal() else self._pause
        self._pause *= 2
        return min(asked, _LONGEST_PAUSE_S, PATIENCE_S - waited)

    def given_up(self, status: int, text: str) -> str:
        """What to add to the message of an error that stands; nothing if it was not waited for."""
        if status not in self._statuses or _is_dead(text):
            return ""
        waited = time.monotonic() - self._began
        return f", still so after {waited:.0f} s: see what keeps it, then the same command asks again"


def _is_dead(text: str) -> bool:
    try:
        return bool(json.loads(text)["error"]["code"] == "dead")
    except (ValueError, KeyError, TypeError):
        return False
