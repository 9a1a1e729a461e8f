"""The list of work of one step after another.

Most steps only add a token to each row. Then the list of the step before still holds but for the ends: each row's last
item reaches one key further, or one more slot of its last page may be read, and each query sees one more. Moving those
takes a tenth of the time of dividing anew, for which a GPU that runs a small model would wait. Of many rows some need
another page in every step, so where rows share keys there are places for it in the list.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from .pieces import Int32s, Ints, Work
from .work import divide_work


class SuccessiveWork:
    """`divide_work` for the steps of an engine.

    A list is moved on until the longest row needs another page, or, where rows are looked at together, until any of
    them needs one that has no place in it: for 4 to 16 steps or a few more, see `tiles.ROOM`.

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
            moves=True,
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
        self.ends: Ints | None = None
        """[rows], where in the list's pages the last one of each row stands, where rows share keys."""
        if self.shares and self.can_move:
            self.ends = work.ends if work.ends is not None else self._item_ends()

    def _item_ends(self) -> Ints:
        """The same where items end with their rows."""
        last = np.flatnonzero(self.at_end)
        ends = np.empty(len(last), dtype=np.int64)
        base, end = self.work.items[last, 0], self.work.items[last, 2]
        ends[self.work.tokens[last].max(1)] = base + (end - 1) // self.page_size
        return ends

    def goes_on(self, pages: Int32s, lengths: npt.NDArray[np.int32], borders: npt.NDArray[np.int64]) -> bool:
        """Whether a step differs from this one in that each row has one key more, by the token that it brings."""
        if not (
            self.can_move
            and borders[-1] == len(lengths) == len(self.lengths)
            and bool((lengths == self.lengths + 1).all())
        ):
            return False
        if not self.shares:
            return pages.shape == self.pages.shape
        return self.work.room > 0 and self._lists_more(pages)

    def _lists_more(self, pages: Int32s) -> bool:
        """Whether rows list the pages that they did, but for those into which full ones go on."""
        width = min(pages.shape[1], self.pages.shape[1])
        other = pages[:, :width] != self.pages[:, :width]
        number = np.count_nonzero(other)
        if number == 0:
            return True
        full = np.flatnonzero(self.lengths % self.page_size == 0)
        column = self.lengths[full] // self.page_size
        full, column = full[column < width], column[column < width]
        return number == np.count_nonzero(other[full, column])

    def move_on(self, pages: Int32s, lengths: npt.NDArray[np.int32]) -> None:
        """Make the list that of such a step. The arrays of the list before stay as they are."""
        work, items = self.work, self.work.items
        if work.ends is None:
            items = items.copy()
            items[:, 2] += self.at_end
        flat = pages.reshape(-1) if self.ends is None else self._with_last_pages(pages)
        limits, ends = work.limits + self.per_query, None if work.ends is None else self.ends
        # Not by `_replace`, which takes a tenth of the time of all of this.
        self.work = Work(
            items, work.tokens, limits, work.tails, work.counts, flat, work.slots, ends, max(work.room - 1, 0)
        )
        self.pages, self.lengths = pages, lengths

    def _with_last_pages(self, pages: Int32s) -> Int32s:
        """The list's pages for a key more of each row: one more slot of its last page, or the first of the next."""
        before = self.lengths % self.page_size
        self.ends = self.ends + (before == 0)
        flat = self.work.pages.copy()
        last = pages[np.arange(len(pages)), self.lengths // self.page_size] * np.int32(self.page_size)
        flat[self.ends] = last + before
        return flat
