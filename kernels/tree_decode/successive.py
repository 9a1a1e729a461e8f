"""The list of work of one step after another.

Most steps only add a token to each row. Then the list of the step before still holds but for the ends: each row's last
item reaches one key further, or one more slot of its last page may be read, and each query sees one more. Moving those
takes a tenth of the time of dividing anew, for which a GPU that runs a small model would wait. Of many rows some need
another page in every step, so where rows share keys there are places for it in the list.

Until a row needs another page, the device can move its list on by itself (`decode_step.end_step`); the list here
follows by several keys at once then.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from .pieces import Int32s, Ints, Moves, Work
from .work import divide_work


class SuccessiveWork:
    """`divide_work` for the steps of an engine.

    A list is moved on for `BLOCK` keys, or, where rows are looked at together, until any of them needs a page that has
    no place in it, see `tiles.ahead_of`.

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
            shares=True,
        )
        self._last = _Divided(work, pages, lengths, borders, slots, self.page_size)
        return work

    @property
    def moves(self) -> Moves | None:
        """What changes when the list that was made last is moved on within pages; None: it cannot be."""
        return None if self._last is None else self._last.moves


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
        self.ends: Ints | None = None
        """[rows], where in the list's pages the last one of each row stands, where rows share keys."""
        self.moves: Moves | None = None
        self.can_move = len(lengths) == int(borders[-1])
        if not self.can_move:  # rows of several tokens; most steps after them have fewer
            return
        self.shares = work.tokens.shape[1] > 1
        self.per_query = (work.tokens >= 0).astype(np.int32)
        # The item that ends where its row does, with the token that the row brings. Tiles have room for that.
        self.at_end = np.zeros(len(work.items), dtype=np.int32)
        if work.ends is None:
            self.at_end += work.items[:, 2] == work.limits[:, 0]
            if self.shares:
                self.at_end *= self.per_query.sum(1) == 1
        ends = len(work.ends) if work.ends is not None else int(self.at_end.sum())
        self.can_move = ends == len(lengths)
        if self.shares and self.can_move:
            self.ends = work.ends if work.ends is not None else self._item_ends()
        self.moves = self._moves()

    def _moves(self) -> Moves | None:
        ends = np.zeros(0) if self.ends is None else self.ends
        return Moves(self.at_end, ends.astype(np.int32)) if self.can_move else None

    def _item_ends(self) -> Ints:
        """The same where items end with their rows."""
        last = np.flatnonzero(self.at_end)
        ends = np.empty(len(last), dtype=np.int64)
        base, end = self.work.items[last, 0], self.work.items[last, 2]
        ends[self.work.tokens[last].max(1)] = base + (end - 1) // self.page_size
        return ends

    def goes_on(self, pages: Int32s, lengths: npt.NDArray[np.int32], borders: npt.NDArray[np.int64]) -> bool:
        """Whether a step differs from this one in that each row has one key more, by the token that it brings, or as
        many more as it has brought since, if that is no more than a page."""
        if not (self.can_move and borders[-1] == len(lengths) == len(self.lengths)):
            return False
        more = int(lengths[0] - self.lengths[0])
        if not 0 < more <= self.page_size or not bool((lengths == self.lengths + more).all()):
            return False
        return self.work.room >= more and (not self.shares or self._lists_more(pages, lengths))

    def _lists_more(self, pages: Int32s, lengths: npt.NDArray[np.int32]) -> bool:
        """Whether rows list the pages that they did, but for those into which full ones go on."""
        width = min(pages.shape[1], self.pages.shape[1])
        other = pages[:, :width] != self.pages[:, :width]
        number = np.count_nonzero(other)
        if number == 0:
            return True
        column = (lengths - 1) // self.page_size
        further = np.flatnonzero((column > (self.lengths - 1) // self.page_size) & (column < width))
        return number == np.count_nonzero(other[further, column[further]])

    def move_on(self, pages: Int32s, lengths: npt.NDArray[np.int32]) -> None:
        """Make the list that of such a step. The arrays of the list before stay as they are."""
        work, items, more = self.work, self.work.items, lengths[0] - self.lengths[0]
        if work.ends is None:
            items = items.copy()
            items[:, 2] += more * self.at_end
            if not self.shares:  # rows stand one after the other
                items[:, 0] = items[:, 0] // self.pages.shape[1] * pages.shape[1]
        flat = pages.reshape(-1) if self.ends is None else self._with_last_pages(pages, lengths)
        limits, ends = work.limits + more * self.per_query, None if work.ends is None else self.ends
        # Not by `_replace`, which takes a tenth of the time of all of this.
        room = max(work.room - int(more), 0)
        rest = work.slots, ends, room, work.shares
        self.work = Work(items, work.tokens, limits, work.tails, work.counts, flat, *rest)
        self.pages, self.lengths = pages, lengths

    def _with_last_pages(self, pages: Int32s, lengths: npt.NDArray[np.int32]) -> Int32s:
        """The list's pages for more keys of each row: more of its last page, or all of it and some of the next."""
        assert self.ends is not None, "rows share keys"
        last = lengths - 1
        further = last // self.page_size > (self.lengths - 1) // self.page_size
        flat = self.work.pages.copy()
        if further.any():
            if lengths[0] > self.lengths[0] + 1:  # else it was full before
                full = self.ends[further]
                flat[full] += np.int32(self.page_size - 1) - flat[full] % np.int32(self.page_size)
            self.ends = self.ends + further
            self.moves = self._moves()
        first = pages[np.arange(len(pages)), last // self.page_size] * np.int32(self.page_size)
        flat[self.ends] = first + last % self.page_size
        return flat
