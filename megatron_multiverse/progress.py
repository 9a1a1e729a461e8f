"""How far a long task is: a bar on a terminal, a line in the log every ten seconds elsewhere."""

from __future__ import annotations

import logging
import time
from types import TracebackType

logger = logging.getLogger(__name__)

PLAIN_LINE_EVERY_S = 10.0


class ProgressLine:
    """Bytes done of a known total, and optionally how many items they were.

    Args:
        task: what the bar is called.
        total: bytes in all.
        done: bytes that an earlier run has done; they count as done, but not for the speed.
        items: plural noun of what `show` counts, e.g. "docs"; empty if nothing is counted.

    Attributes:
        done: bytes done by now.
    """

    def __init__(self, task: str, total: int, *, done: int = 0, items: str = "") -> None:
        from tqdm import tqdm

        self._total, self._before, self._items = max(total, 1), done, items
        self.done = done
        self._bar = tqdm(total=total, initial=done, unit="B", unit_scale=True, disable=None, desc=task)
        self._started = self._printed = time.monotonic()

    def __enter__(self) -> ProgressLine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bar.close()

    def show(self, done: int, count: int = 0) -> None:
        """Say that `done` bytes of the total, and `count` items, are done by now."""
        self.done = done
        now = time.monotonic()
        seconds = max(now - self._started, 1e-9)
        if not self._bar.disable:
            if self._items:
                self._bar.set_postfix_str(f"{count / seconds:,.0f} {self._items}/s", refresh=False)
            self._bar.update(done - self._bar.n)
        elif now - self._printed >= PLAIN_LINE_EVERY_S and done > self._before:
            self._printed = now
            rate = (done - self._before) / seconds
            items = f"{count} {self._items}  {count / seconds:.1f} {self._items}/s  " if self._items else ""
            eta = max(self._total - done, 0) / rate
            logger.info("%5.1f %%  %s%.2f MB/s  ETA %.0f s", 100 * done / self._total, items, rate / 1e6, eta)
