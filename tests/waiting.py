"""Waiting for what another thread or process does."""

from __future__ import annotations

import time
from collections.abc import Callable

PATIENCE_S = 200.0
"""Nothing that a test waits for takes so long, not even on a machine that is many times slower or stands still for
seconds: the limit only ends a test that would wait for ever, and says what it waited for. pytest's own is 900 s."""


def wait_until(condition: Callable[[], object], what: str) -> None:
    """Return as soon as the condition holds.

    Args:
        condition: looked at every few milliseconds, and once more after the limit.
        what: is waited for, for the error.

    Raises:
        TimeoutError: it did not hold within `PATIENCE_S`.
    """
    limit = time.monotonic() + PATIENCE_S
    while not condition():
        if time.monotonic() > limit and not condition():
            raise TimeoutError(f"waited {PATIENCE_S:.0f} s in vain until {what}")
        time.sleep(0.005)
