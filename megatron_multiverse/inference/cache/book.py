"""The page book: which pages of the cache are free, and how many owners the others have. Integers only.

A page holds the keys and values of `page_size` tokens in every layer; the tensors themselves are the store's
(`step/forward.py`), which every rank has for its own layers and heads. Of this book there is one, on one rank. Pages
are shared between branches, so each has a count of its owners.

A page that nobody owns may still be worth keeping: while its content is known (`keep`), it lies idle, is found again by
`cache/prefix.py`, and is taken for something else only when no other page is left, the longest idle one first. So a
page that is kept never stands in the way of one that is needed, and counts as available.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import numpy.typing as npt

from megatron_multiverse.errors import GenerationError

PageList = Sequence[int] | npt.NDArray[np.int32]


class PageBook:
    """The free list and the owners.

    Args:
        num_pages: pages there are.
        page_size: tokens per page.
        remember_freed: keep a list of the pages that came free, for a store that fills them with NaN.
    """

    def __init__(self, num_pages: int, page_size: int, *, remember_freed: bool = False) -> None:
        if num_pages < 1 or page_size < 1:
            raise GenerationError(
                f"num_pages ({num_pages}) and page_size ({page_size}) must be at least 1; "
                "use page_size 1, 16 or 64 and enough pages for prompt and answer"
            )
        self.num_pages = num_pages
        self.page_size = page_size
        self.free: list[int] = []
        """Pages nobody owns and nobody will look for; the last one is taken next."""
        self.idle: OrderedDict[int, None] = OrderedDict()
        """Pages nobody owns whose content is known; the first one goes next, once `free` is empty."""
        self.kept: set[int] = set()
        """Pages whose content is known, owned or idle."""
        self.on_evict: Callable[[int], None] = self.kept.discard
        """Told of every idle page that is taken for something else."""
        self.owners: npt.NDArray[np.int32] = np.zeros(num_pages, dtype=np.int32)
        """int32 [num_pages]: how many nodes list each page."""
        self.freed: set[int] | None = set() if remember_freed else None
        """Pages that came free since `take_freed`; None unless they are to be remembered."""
        self.reset()

    @property
    def available(self) -> int:
        """How many pages can be allocated."""
        return len(self.free) + len(self.idle)

    def allocate(self, count: int) -> list[int]:
        """Take `count` pages, each with one owner.

        Raises:
            GenerationError: fewer pages are available. Callers look first; this is the last line.
        """
        if count > self.available:
            raise GenerationError(
                f"{count} pages asked for, {self.available} of {self.num_pages} free; give the engine more num_pages"
            )
        while len(self.free) < count:
            page, _ = self.idle.popitem(last=False)
            self.kept.discard(page)
            self.on_evict(page)
            self.free.append(page)
        pages = self.free[len(self.free) - count :]
        del self.free[len(self.free) - count :]
        if count == 1:  # most often, and a list takes numpy ten times as long as a number
            self.owners[pages[0]] = 1
        else:
            self.owners[pages] = 1
        return pages

    def retain(self, pages: PageList, count: int = 1) -> None:
        """Add `count` owners to each page; the pages are different ones."""
        index = np.asarray(pages, dtype=np.int64)
        owners = self.owners[index]
        assert owners.all(), "a free page cannot be shared"
        self.owners[index] = owners + np.int32(count)

    def keep(self, page: int) -> None:
        """The content of an owned page is known from now on."""
        self.kept.add(page)

    def drop(self, page: int) -> None:
        """The content of a kept page is known no more."""
        self.kept.discard(page)
        if page in self.idle:
            del self.idle[page]
            self._give_back([page])

    def adopt(self, pages: PageList) -> None:
        """Add one owner to each of these kept pages, idle or not."""
        for page in pages:
            self.idle.pop(int(page), None)
        self.owners[np.asarray(pages, dtype=np.int64)] += 1

    def release(self, pages: PageList) -> None:
        """Remove one owner from each page; the pages are different ones. Those without owner become free or idle.

        Of a list the last page is evicted first: the text in it is of no use without the text before it.
        """
        index = np.asarray(pages, dtype=np.int64)
        owners = self.owners[index]
        assert owners.all(), "a page without owner cannot be released"
        self.owners[index] = owners - np.int32(1)
        freed = index[owners == 1].tolist()
        if self.kept:
            self.idle.update((page, None) for page in reversed(freed) if page in self.kept)
            freed = [page for page in freed if page not in self.kept]
        self._give_back(freed)

    def _give_back(self, pages: list[int]) -> None:
        self.free += pages
        if self.freed is not None:
            self.freed.update(pages)

    def take_freed(self) -> list[int]:
        """Pages that came free since the last call and still are; none unless `remember_freed`."""
        if not self.freed:
            return []
        freed, self.freed = self.freed, set()
        return [page for page in freed if self.owners[page] == 0 and page not in self.kept]

    def reset(self) -> None:
        """All pages are free and nothing in them is known, whatever the book said."""
        self.free = list(range(self.num_pages - 1, -1, -1))
        self.idle.clear()
        self.kept.clear()
        self.owners[:] = 0
        if self.freed is not None:
            self.freed.update(self.free)

    def check_integrity(self, tables: Iterable[PageList]) -> None:
        """Compare the book with the page lists of all owners.

        Raises:
            GenerationError: a count is wrong or a page is lost; the message names the pages.
        """
        owned = [np.asarray(table, dtype=np.int64) for table in tables if len(table)]
        census = np.bincount(np.concatenate(owned) if owned else np.empty(0, dtype=np.int64), minlength=self.num_pages)
        free = np.bincount(np.asarray([*self.free, *self.idle], dtype=np.int64), minlength=self.num_pages)
        wrong = np.flatnonzero(census != self.owners).tolist()
        lost = np.flatnonzero(free + (self.owners > 0) != 1).tolist()
        if wrong or lost:
            raise GenerationError(
                f"page book out of balance: wrong counts on pages {wrong}, lost or doubly free pages {lost}; "
                "this is a fault of the engine, please report it"
            )
