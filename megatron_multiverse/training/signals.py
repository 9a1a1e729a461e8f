"""SIGTERM and SIGUSR1 ask the run to save and stop; a batch script turns the exit code into a requeue.

What a run forks (loader workers, the processes through which megatron-core writes) ends with it, also when the run is
killed without warning, as by the kernel when memory is short.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from multiprocessing import resource_tracker
from types import FrameType, TracebackType
from typing import Any

from megatron_multiverse.child_processes import end_with_parent

EXIT_CODE_STOPPED = 75
"""Exit code of a run that was asked to stop and saved (EX_TEMPFAIL: try again later)."""

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

_starting_workers_of: int | None = None
"""Process id of the run while it is inside `hold_signals`."""


def _end_with_parent() -> None:
    """In a process that was forked inside `hold_signals`: die when the run does."""
    global _starting_workers_of
    if _starting_workers_of is not None:
        end_with_parent(_starting_workers_of)
    _starting_workers_of = None  # what this process forks is its own affair


os.register_at_fork(after_in_child=_end_with_parent)


@contextlib.contextmanager
def hold_signals() -> Iterator[None]:
    """Start worker processes inside this block: they inherit that the stop signals are blocked, and end with the run.

    A batch system signals every process of the job. Without this, the signal that asks the trainer to save would kill
    the loader workers and the process through which megatron-core saves, and the save would fail. The trainer itself
    receives a signal at the end of the block at the latest.
    """
    global _starting_workers_of
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    # Python starts this process when the first worker needs it, and then unblocks SIGTERM. So it is started now, and
    # SIGTERM is blocked again.
    resource_tracker.ensure_running()
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    _starting_workers_of = os.getpid()
    try:
        yield
    finally:
        _starting_workers_of = None
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class StopSignals:
    """While active, the stop signals set a flag instead of killing the process."""

    def __init__(self) -> None:
        self.received: str | None = None
        self._owner = os.getpid()
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignals:
        for number in STOP_SIGNALS:
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
        """True once a signal came to this process. Signals may reach some ranks only: the trainer asks all of them."""
        return self.received is not None


def listening(stop: StopSignals | None) -> contextlib.AbstractContextManager[StopSignals]:
    """Signals that somebody listens to already, or those of this block."""
    return StopSignals() if stop is None else contextlib.nullcontext(stop)
