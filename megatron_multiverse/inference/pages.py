"""The page pool: where cached keys and values live, and who owns them.

A page holds `page_size` slots, a slot the key and value of one token in every layer. Pages are shared between
branches, so each has a reference count. The last page is a dummy: padding reads it, nothing ever owns it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt
import torch

from megatron_multiverse.errors import GenerationError
from megatron_multiverse.kernels.kv_copy import copy_slots

Slots = npt.NDArray[np.int64]


class PagePool:
    """Key/value storage with an allocator.

    Args:
        num_pages: pages that can be owned (one more is allocated as the dummy).
        page_size: slots per page.
        num_layers: layers of this stage of the model.
        num_kv_heads: key/value heads of this rank.
        head_dim: width of one head.
        dtype: type of the cache, that of the model's activations.
        device: where the cache lives.
        debug: fill freed pages with NaN, so that a read of a freed page shows in the logits.
    """

    def __init__(
        self,
        num_pages: int,
        page_size: int,
        *,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        debug: bool = False,
    ) -> None:
        if num_pages < 1 or page_size < 1:
            raise GenerationError(
                f"num_pages ({num_pages}) and page_size ({page_size}) must be at least 1; "
                "use page_size 1, 16 or 64 and enough pages for prompt and answer"
            )
        self.num_pages = num_pages
        self.page_size = page_size
        self.dummy_slot = num_pages * page_size
        self.debug = debug
        shape = (num_layers, (num_pages + 1) * page_size, num_kv_heads, head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.copied_tokens = 0
        self._free = list(range(num_pages - 1, -1, -1))
        self._refcount: npt.NDArray[np.int32] = np.zeros(num_pages, dtype=np.int32)
        self._unwritten: dict[int, list[int]] = {}
        self._origin: dict[int, int] = {}

    # -- ownership ---------------------------------------------------------------------------------------------

    @property
    def num_free(self) -> int:
        """Pages nobody owns."""
        return len(self._free)

    def allocate(self, count: int) -> list[int]:
        """Take `count` pages, each with one owner.

        Raises:
            GenerationError: fewer pages are free. Callers check `num_free` first; this is the last line.
        """
        if count > len(self._free):
            raise GenerationError(
                f"{count} pages asked for, {len(self._free)} of {self.num_pages} free; give the engine more num_pages"
            )
        pages = self._free[len(self._free) - count :]
        del self._free[len(self._free) - count :]
        self._refcount[pages] = 1
        return pages

    def retain(self, pages: Sequence[int]) -> None:
        """Add one owner to each page."""
        index = np.asarray(pages, dtype=np.int64)
        assert (self._refcount[index] > 0).all(), "a free page cannot be shared"
        np.add.at(self._refcount, index, 1)

    def release(self, pages: Sequence[int]) -> None:
        """Remove one owner from each page; pages without owner become free."""
        for page in pages:
            assert self._refcount[page] > 0, f"page {page} has no owner to remove"
            self._refcount[page] -= 1
            if self._refcount[page] == 0:
                self._free.append(page)
                if self.debug:
                    self._poison(page)

    def owners(self, page: int) -> int:
        """How many nodes list this page."""
        return int(self._refcount[page])

    def _poison(self, page: int) -> None:
        slots = slice(page * self.page_size, (page + 1) * self.page_size)
        self.keys[:, slots] = float("nan")
        self.values[:, slots] = float("nan")

    def reset(self) -> None:
        """All pages are free and nothing is expected, whatever the books said."""
        self._free = list(range(self.num_pages - 1, -1, -1))
        self._refcount[:] = 0
        self.settle()
        if self.debug:
            for page in self._free:
                self._poison(page)

    def check_integrity(self, tables: Iterable[Sequence[int]]) -> None:
        """Compare the books with the page lists of all living nodes (the owner census).

        Raises:
            GenerationError: a count is wrong or a page is lost; the message names the pages.
        """
        owned = [np.asarray(table, dtype=np.int64) for table in tables if len(table)]
        census = np.bincount(np.concatenate(owned) if owned else np.empty(0, dtype=np.int64), minlength=self.num_pages)
        free = np.bincount(np.asarray(self._free, dtype=np.int64), minlength=self.num_pages)
        wrong = np.flatnonzero(census != self._refcount).tolist()
        lost = np.flatnonzero(free + (self._refcount > 0) != 1).tolist()
        if wrong or lost:
            raise GenerationError(
                f"page pool out of balance: wrong counts on pages {wrong}, lost or doubly free pages {lost}; "
                "this is a fault of the engine, please report it"
            )

    # -- contents ----------------------------------------------------------------------------------------------

    def expect(self, slots: Iterable[int]) -> None:
        """The step in preparation will write these slots; copies made until `settle` follow them."""
        for slot in slots:
            self._unwritten[slot] = []

    def alias_pairs(self) -> list[tuple[int, int]]:
        """(expected slot, further slot that must receive the same) for this step."""
        return [(slot, alias) for slot, aliases in self._unwritten.items() for alias in aliases]

    def settle(self) -> None:
        """The step has run (or never will): no slot is expected any more."""
        self._unwritten.clear()
        self._origin.clear()

    def copy(self, source: Slots, target: Slots) -> None:
        """Copy slots in all layers. A source not yet written gets the target as an alias instead.

        This is what lets a fork (or join) happen in the very step that computes the forking token. An alias may be
        copied in turn (a replay joins and forks again in one step): its copy follows the slot that is computed.
        """
        self.copied_tokens += len(source)
        if self._unwritten:
            written = np.ones(len(source), dtype=bool)
            for k, (src, dst) in enumerate(zip(source.tolist(), target.tolist(), strict=True)):
                origin = self._origin.get(src, src)
                if origin in self._unwritten:
                    self._unwritten[origin].append(dst)
                    self._origin[dst] = origin
                    written[k] = False
            source, target = source[written], target[written]
        if len(source):
            device = self.keys.device
            copy_slots(self.keys, self.values, torch.from_numpy(source).to(device), torch.from_numpy(target).to(device))
