"""How far a preprocessing run is: counters that the workers share with the process that shows them."""

from __future__ import annotations

from typing import Any


class Progress:
    """Counters shared by workers and parent: bytes of input read, documents written."""

    def __init__(self, context: Any) -> None:
        self._read = context.Value("q", 0)
        self._written = context.Value("q", 0)

    def add(self, read: int, written: int) -> None:
        with self._read.get_lock():
            self._read.value += read
        with self._written.get_lock():
            self._written.value += written

    @property
    def values(self) -> tuple[int, int]:
        return self._read.value, self._written.value
