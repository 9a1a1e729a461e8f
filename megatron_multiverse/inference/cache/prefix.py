"""Reuse of the cache between requests whose prompts begin alike.

Only full pages of a prompt are kept, under a hash chained over all ids before them. Nothing that was computed inside
a block or after one enters: the keys of a path, computed beside its siblings, are not those of the same text read
causally, so text alone must never find them.
"""

from __future__ import annotations

import hashlib
import itertools
import os
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np

from megatron_multiverse.inference.cache.book import PageBook, PageList


class PrefixCache:
    """Pages by the text up to their end; the least recently used go first.

    Args:
        book: who owns which page; this cache is one more owner of each page it keeps.
        capacity: most pages kept.
    """

    def __init__(self, book: PageBook, capacity: int) -> None:
        self.book = book
        self.capacity = capacity
        self._pages: OrderedDict[bytes, int] = OrderedDict()
        # Hashes cannot be prepared outside of this process.
        self._salt = os.urandom(16)

    @property
    def pages(self) -> list[int]:
        """Pages kept, for the owner census."""
        return list(self._pages.values())

    def find(self, prompt: Sequence[int]) -> list[int]:
        """Pages of the longest known beginning of `prompt`, leaving at least one token to compute."""
        keys = self._keys(prompt, (len(prompt) - 1) // self.book.page_size)
        known = list(itertools.takewhile(self._pages.__contains__, keys))
        self._touch(known)
        return [self._pages[key] for key in known]

    def _touch(self, keys: Sequence[bytes]) -> None:
        """These were used last. A page is found only after those before it, so the last pages of a prompt go first."""
        for key in reversed(keys):
            self._pages.move_to_end(key)

    def add(self, prompt: Sequence[int], pages: PageList) -> None:
        """Keep the full pages of a prompt that has been computed; `pages` begin with them."""
        full = min(len(prompt) // self.book.page_size, self.capacity)
        keys = self._keys(prompt, full)
        for key, page in zip(keys, map(int, pages[:full]), strict=True):
            if key not in self._pages:
                self.book.retain([page])
                self._pages[key] = page
        self._touch(keys)
        while len(self._pages) > self.capacity:
            self.book.release([self._pages.popitem(last=False)[1]])

    def clear(self) -> bool:
        """Let go of everything; whether there was anything."""
        pages = self.pages
        self._pages.clear()
        self.book.release(pages)
        return bool(pages)

    def forget(self) -> None:
        """Drop everything without giving pages back: the book itself is about to be reset."""
        self._pages.clear()

    def _keys(self, prompt: Sequence[int], count: int) -> list[bytes]:
        size = self.book.page_size
        key, keys = self._salt, []
        for k in range(count):
            data = np.asarray(prompt[k * size : (k + 1) * size], dtype=np.int64).tobytes()
            key = hashlib.blake2b(key + data, digest_size=16).digest()
            keys.append(key)
        return keys
