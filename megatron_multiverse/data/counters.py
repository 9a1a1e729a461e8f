"""How far a preprocessing run is: counters that the workers share with the process that shows them."""

from __future__ import annotations

from typing import Any


class Progress:
    """Counters shared by workers and parent: bytes of input read, documents written; and whether to stop."""

    def __init__(self, context: Any) -> None:
        self._read = context.Value("q", 0)
        self._written = context.Value("q", 0)
        self._stopped = context.Event()

    def add(self, read: int, written: int) -> None:
        """Count a batch.

        Raises:
            InterruptedError: the run is over; the shard stays unfinished.
        """
        with self._read.get_lock():
            self._read.value += read
        with self._written.get_lock():
            self._written.value += written
        if self._stopped.is_set():
            raise InterruptedError("the run was stopped")

    def stop(self) -> None:
        """Let no worker begin another batch."""
        self._stopped.set()

    @property
    def values(self) -> tuple[int, int]:
        return self._read.value, self._written.value
