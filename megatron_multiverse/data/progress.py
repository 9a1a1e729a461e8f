"""How far a preprocessing run is: counters shared with the workers, and the line that shows them."""

from __future__ import annotations

import logging
import time
from typing import Any

logger = logging.getLogger(__name__)

_PLAIN_LINE_EVERY_S = 10.0


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


class ProgressLine:
    """tqdm on a terminal, a plain line every ten seconds elsewhere."""

    def __init__(self, total_bytes: int) -> None:
        from tqdm import tqdm

        self._total = max(total_bytes, 1)
        self._bar = tqdm(total=total_bytes, unit="B", unit_scale=True, disable=None, desc="preprocess")
        self._started = self._printed = time.monotonic()

    def __enter__(self) -> ProgressLine:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def show(self, num_bytes: int, documents: int) -> None:
        now = time.monotonic()
        seconds = max(now - self._started, 1e-9)
        if not self._bar.disable:
            self._bar.set_postfix_str(f"{documents / seconds:,.0f} docs/s", refresh=False)
            self._bar.update(num_bytes - self._bar.n)
        elif now - self._printed >= _PLAIN_LINE_EVERY_S and num_bytes:
            self._printed = now
            eta = seconds * max(self._total - num_bytes, 0) / num_bytes
            logger.info(
                "%5.1f %%  %d documents  %.1f docs/s  %.2f MB/s  ETA %.0f s",
                100 * num_bytes / self._total, documents, documents / seconds, num_bytes / seconds / 1e6, eta,
            )  # fmt: skip
