"""Reuse of the cache between requests whose prompts begin alike.

Only full pages of a prompt are kept, under a hash chained over all ids before them. Nothing that was computed inside
or behind a block enters: the keys of a path, computed beside its siblings, are not those of the same text read
causally, so text alone must never find them.
"""

from __future__ import annotations

import hashlib
import os
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np

from megatron_multiverse.inference.pages import PagePool


class PrefixCache:
    """Pages by the text up to their end; the least recently used go first.

    Args:
        pool: where the pages live; the cache is one more owner of each page it keeps.
        capacity: most pages kept.
    """

    def __init__(self, pool: PagePool, capacity: int) -> None:
        self.pool = pool
        self.capacity = capacity
        self.hits = 0
        self._pages: OrderedDict[bytes, int] = OrderedDict()
        # Hashes cannot be prepared outside of this process.
        self._salt = os.urandom(16)

    @property
    def pages(self) -> list[int]:
        """Pages kept, for the owner census."""
        return list(self._pages.values())

    def find(self, prompt: Sequence[int]) -> list[int]:
        """Pages of the longest known beginning of `prompt`, leaving at least one token to compute."""
        found = []
        for key in self._keys(prompt, (len(prompt) - 1) // self.pool.page_size):
            page = self._pages.get(key)
            if page is None:
                break
            self._pages.move_to_end(key)
            found.append(page)
        self.hits += len(found)
        return found

    def add(self, prompt: Sequence[int], pages: Sequence[int]) -> None:
        """Keep the full pages of a prompt that has been computed; `pages` begin with them."""
        full = len(prompt) // self.pool.page_size
        for key, page in zip(self._keys(prompt, full), pages[:full], strict=True):
            if key not in self._pages and self.capacity > 0:
                if len(self._pages) >= self.capacity:
                    self.pool.release([self._pages.popitem(last=False)[1]])
                self.pool.retain([page])
                self._pages[key] = page

    def clear(self) -> bool:
        """Let go of everything; whether there was anything."""
        pages = self.pages
        self._pages.clear()
        self.pool.release(pages)
        return bool(pages)

    def forget(self) -> None:
        """Drop the books without giving pages back: the pool itself is about to be reset."""
        self._pages.clear()

    def _keys(self, prompt: Sequence[int], count: int) -> list[bytes]:
        size = self.pool.page_size
        key, keys = self._salt, []
        for k in range(count):
            data = np.asarray(prompt[k * size : (k + 1) * size], dtype=np.int64).tobytes()
            key = hashlib.blake2b(key + data, digest_size=16).digest()
            keys.append(key)
        return keys
