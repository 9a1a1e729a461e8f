"""How far a long task is: a bar on a terminal, a line in the log every ten seconds elsewhere.

A training run has a bar on a terminal alone, since it writes log lines of its own.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from types import TracebackType

logger = logging.getLogger(__name__)

PLAIN_LINE_EVERY_S = 10.0
"""Seconds between two lines of the log where there is no terminal."""


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


@contextlib.contextmanager
def step_bar(total: int, done: int, *, shown: bool) -> Iterator[Callable[[], object]]:
    """A bar over the steps of a run, below its log lines, if standard error is a terminal; otherwise nothing.

    Args:
        total: steps of the whole run.
        done: steps that an earlier run has done; they count as done, but not for the speed.
        shown: false shows no bar anywhere.

    Yields:
        What is to be called after each step.
    """
    from tqdm import tqdm
    from tqdm.contrib.logging import logging_redirect_tqdm

    with contextlib.ExitStack() as stack:
        disable = None if shown else True  # None: unless standard error is a terminal
        bar = stack.enter_context(tqdm(total=total, initial=done, unit="step", desc="training", disable=disable))
        if not bar.disable:  # the root logger's lines then go over the bar, which is drawn anew below them
            stack.enter_context(logging_redirect_tqdm())
        yield bar.update
