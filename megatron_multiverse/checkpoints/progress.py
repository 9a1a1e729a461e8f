"""How far a conversion is: tqdm on a terminal, a plain line every ten seconds elsewhere."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from types import TracebackType

from torch import Tensor

from megatron_multiverse.checkpoints.endpoints import Stream
from megatron_multiverse.checkpoints.names import Entry

logger = logging.getLogger(__name__)

PLAIN_LINE_EVERY_S = 10.0


class ProgressLine:
    """Bytes of tensors converted so far.

    Args:
        total: bytes in all.
        done: bytes that an earlier run has converted.
    """

    def __init__(self, total: int, done: int) -> None:
        from tqdm import tqdm

        self.total, self.done = max(total, 1), done
        self._bar = tqdm(total=total, initial=done, unit="B", unit_scale=True, disable=None, desc="convert")
        self._started = self._printed = time.monotonic()
        self._first = done

    def counted(self, tensors: Stream) -> Iterator[tuple[Entry, Tensor]]:
        """The same stream, counted as it is consumed."""
        for entry, tensor in tensors:
            size = tensor.nbytes
            yield entry, tensor
            del tensor
            self._add(size)

    def _add(self, size: int) -> None:
        self.done += size
        self._bar.update(size)
        now = time.monotonic()
        if self._bar.disable and now - self._printed >= PLAIN_LINE_EVERY_S:
            self._printed = now
            rate = (self.done - self._first) / max(now - self._started, 1e-9)
            left = max(self.total - self.done, 0) / rate
            logger.info("%5.1f %%  %.2f GB/s  ETA %.0f s", 100 * self.done / self.total, rate / 1e9, left)

    def __enter__(self) -> ProgressLine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bar.close()
