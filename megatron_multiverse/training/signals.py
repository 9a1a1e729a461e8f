"""SIGTERM and SIGUSR1 ask the run to save and stop; a batch script turns the exit code into a requeue."""

from __future__ import annotations

import os
import signal
from types import FrameType, TracebackType
from typing import Any

EXIT_CODE_STOPPED = 75
"""Exit code of a run that was asked to stop and saved (EX_TEMPFAIL: try again later)."""


class StopSignals:
    """While active, the signals set a flag instead of killing the process.

    Forked loader workers inherit the handler and ignore the signal, so the process that saves outlives them.
    """

    def __init__(self, signals: tuple[signal.Signals, ...] = (signal.SIGTERM, signal.SIGUSR1)) -> None:
        self.signals = signals
        self.received: str | None = None
        self._owner = os.getpid()
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignals:
        for number in self.signals:
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() == self._owner:
            self.received = signal.Signals(number).name

    def __bool__(self) -> bool:
        """True once a signal came. With several ranks this is the place to all-reduce the flag."""
        return self.received is not None
