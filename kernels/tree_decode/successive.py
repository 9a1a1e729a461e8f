"""The list of work of one step after another.

Most steps only add a token to each row. Then the list of the step before still holds but for the ends: each row's last
item reaches one key further, or one more slot of its last page may be read, and each query sees one more. Moving those
takes a tenth of the time of dividing anew, for which a GPU that runs a small model would wait.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from .pieces import Int32s, Work
from .work import divide_work


class SuccessiveWork:
    """`divide_work` for the steps of an engine.

    A list is moved on until the longest row needs another page, or, where rows are looked at together, any of them
    does. Items are then at most a page longer than `divide_work` would make them.

    Args:
        page_size: keys per page.
        kv_heads: key/value heads.
        processors: multiprocessors to be kept busy.
        sharers: queries that may share an item, see `most_sharers`.
    """

    def __init__(self, *, page_size: int, kv_heads: int, processors: int, sharers: int) -> None:
        self.page_size, self.kv_heads, self.processors = page_size, kv_heads, processors
        self.sharers = sharers
        self._last: _Divided | None = None

    def divide(self, pages: Int32s, lengths: npt.NDArray[np.int32], borders: npt.NDArray[np.int64], slots: int) -> Work:
        """The list of a step; see `divide_work` for the arguments. None of them may change later."""
        last = self._last
        if last is not None and last.slots == slots and last.goes_on(pages, lengths, borders):
            last.move_on(pages, lengths)
            return last.work
        work = divide_work(
            pages,
            lengths,
            borders,
            page_size=self.page_size,
            kv_heads=self.kv_heads,
            processors=self.processors,
            slots=slots,
            sharers=self.sharers,
        )
        self._last = _Divided(work, pages, lengths, borders, slots, self.page_size)
        return work


class _Divided:
    """A list and what it was made for."""

    def __init__(
        self,
        work: Work,
        pages: Int32s,
        lengths: npt.NDArray[np.int32],
        borders: npt.NDArray[np.int64],
        slots: int,
        page_size: int,
    ) -> None:
        self.work, self.pages, self.lengths = work, pages, lengths
        self.slots, self.page_size = slots, page_size
        self.shares = work.tokens.shape[1] > 1
        self.per_query = (work.tokens >= 0).astype(np.int32)
        # The item that ends where its row does, with the token that the row brings. Tiles have room for that.
        self.at_end = np.zeros(len(work.items), dtype=np.int32)
        if work.ends is None:
            self.at_end += work.items[:, 2] == work.limits[:, 0]
            if self.shares:
                self.at_end *= self.per_query.sum(1) == 1
        ends = len(work.ends) if work.ends is not None else int(self.at_end.sum())
        self.can_move = ends == len(lengths) == borders[-1]

    def goes_on(self, pages: Int32s, lengths: npt.NDArray[np.int32], borders: npt.NDArray[np.int64]) -> bool:
        """Whether a step differs from this one in that each row has one key more, by the token that it brings."""
        return (
            self.can_move
            and borders[-1] == len(lengths)
            and pages.shape == self.pages.shape
            and bool((lengths == self.lengths + 1).all())
            # Where rows share keys the list has the pages that were in use alone.
            and (not self.shares or bool((self.lengths % self.page_size).all() and (pages == self.pages).all()))
        )

    def move_on(self, pages: Int32s, lengths: npt.NDArray[np.int32]) -> None:
        """Make the list that of such a step. The arrays of the list before stay as they are."""
        work, items, flat = self.work, self.work.items.copy(), self.work.pages
        items[:, 2] += self.at_end
        if not self.shares:
            flat = pages.reshape(-1)
        elif work.ends is not None:
            flat = flat.copy()
            flat[work.ends] += 1
        self.work = work._replace(items=items, limits=work.limits + self.per_query, pages=flat)
        self.pages, self.lengths = pages, lengths
