"""A clock that a busy machine does not hurry."""

from __future__ import annotations

import time

from megatron_multiverse.training import loop, metrics, phases


class TestClock:
    """Stands in for the module `time`: each look is `tick` seconds later than the one before, and else it stands.

    Attributes:
        now: seconds, which tests may put forward.
    """

    __test__ = False
    time = staticmethod(time.time)

    def __init__(self, tick: float = 0.0) -> None:
        self.now, self._tick = 0.0, tick

    def perf_counter(self) -> float:
        self.now += self._tick
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


CLOCKED = (loop, metrics, phases)
"""The modules that measure a training step; each has its own name `time`."""
