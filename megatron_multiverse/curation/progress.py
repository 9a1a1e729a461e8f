"""How far a run is, what it has cost and when it will be done."""

from __future__ import annotations

import logging
import time

from megatron_multiverse.progress import PLAIN_LINE_EVERY_S

logger = logging.getLogger(__name__)


class SampleProgress:
    """A bar on a terminal, a line in the log every ten seconds elsewhere.

    Args:
        total: samples in all.
        done: samples that earlier starts have finished; they count as done, but not for the speed.
    """

    def __init__(self, total: int, done: int) -> None:
        from tqdm import tqdm

        self._total, self._before, self._done = total, done, done
        self._bar = tqdm(total=total, initial=done, unit="sample", disable=None, desc="curating")
        self._started = self._printed = time.monotonic()

    def show(self, passed: int, set_aside: int, dollars: float | None) -> None:
        """One more sample is finished.

        Args:
            passed: samples that have passed, earlier starts included.
            set_aside: those that have not.
            dollars: spent by now; None where prices are not known.
        """
        self._done += 1
        now = time.monotonic()
        cost = "" if dollars is None else f", ${dollars:.2f}"
        if not self._bar.disable:
            self._bar.set_postfix_str(f"{set_aside} set aside{cost}", refresh=False)
            self._bar.update()
        elif now - self._printed >= PLAIN_LINE_EVERY_S:
            self._printed = now
            left = (self._total - self._done) * (now - self._started) / (self._done - self._before)
            logger.info(
                "%d of %d samples: %d passed, %d set aside%s, ETA %.0f s",
                self._done, self._total, passed, set_aside, cost, left,
            )  # fmt: skip

    def close(self) -> None:
        """End the bar's line."""
        self._bar.close()
