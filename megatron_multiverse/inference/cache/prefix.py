"""Reuse of the cache between requests whose text begins alike.

Full pages of a root are found by a hash chained over all ids before them, each with its first position and a salt.
Only the root's text up to its first fork is kept. Nothing that was computed inside a block or after one enters: the
keys of a path, computed beside its siblings, are not those of the same text read causally, so text alone must never
find them.

A page may be found as soon as the step that computes it is planned, by other rows of that step too: every layer writes
the keys of all rows before any row reads. So requests with one prompt that come at once compute it once.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence

import numpy as np

from megatron_multiverse.inference.cache.book import PageBook, PageList


class PageKeys:
    """The keys of the full pages of one text, made as the text grows.

    Args:
        page_size: tokens per page.
        salt: texts with different salts never have a key in common.
    """

    def __init__(self, page_size: int, salt: bytes) -> None:
        self._size = page_size
        self._salt = salt
        self._keys: list[bytes] = []

    def key(self, ids: Sequence[int], page: int) -> bytes:
        """Key of a full page of `ids`, a text that begins as it did in earlier calls."""
        if page >= len(self._keys):
            self._extend(ids)
        return self._keys[page]

    def _extend(self, ids: Sequence[int]) -> None:
        size, done = self._size, len(self._keys)
        key = self._keys[-1] if self._keys else self._salt
        text = np.asarray(ids[done * size : len(ids) // size * size], dtype=np.int64).tobytes()
        for offset in range(0, len(text), 8 * size):
            position = done * size + offset // 8
            page = position.to_bytes(8, "little") + text[offset : offset + 8 * size]
            key = hashlib.blake2b(key + page, digest_size=16).digest()
            self._keys.append(key)


class PrefixCache:
    """Which page holds which text.

    It owns no page: kept pages that nobody owns lie idle in the book until they are needed for something else.

    Args:
        book: who owns which page.
        enabled: whether anything is kept.
    """

    def __init__(self, book: PageBook, *, enabled: bool = True) -> None:
        self.book = book
        self.enabled = enabled
        book.on_evict = self._forget
        self._pages: dict[bytes, int] = {}
        self._keys: dict[int, bytes] = {}
        # Hashes cannot be prepared outside of this process.
        self._secret = os.urandom(16)

    def __len__(self) -> int:
        return len(self._pages)

    def keys(self, salt: str) -> PageKeys:
        """The keys of a new text; texts share pages only with those of the same salt."""
        return PageKeys(self.book.page_size, hashlib.blake2b(salt.encode(), key=self._secret).digest())

    def find(self, keys: PageKeys, ids: Sequence[int], start: int, end: int) -> list[int]:
        """Known pages of `ids` from page `start` on, up to the first that is not known or page `end`."""
        found: list[int] = []
        for k in range(start, end) if self._pages else ():
            page = self._pages.get(keys.key(ids, k))
            if page is None:
                break
            found.append(page)
        return found

    def add(self, keys: PageKeys, ids: Sequence[int], pages: PageList, start: int, end: int) -> None:
        """Keep the pages [start, end) of a text; `pages` are all of it, with an owner each."""
        for k in range(start, end) if self.enabled else ():
            key, page = keys.key(ids, k), int(pages[k])
            if key not in self._pages and page not in self._keys:
                self._pages[key], self._keys[page] = page, key
                self.book.keep(page)

    def drop(self, pages: PageList) -> None:
        """What these pages hold is not to be trusted: nobody finds it any more."""
        for page in map(int, pages):
            if page in self._keys:
                self._forget(page)
                self.book.drop(page)

    def clear(self) -> None:
        """Forget everything."""
        self.drop(list(self._keys))

    def forget(self) -> None:
        """Forget everything without telling the book, which is about to be reset."""
        self._pages.clear()
        self._keys.clear()

    def _forget(self, page: int) -> None:
        self._pages.pop(self._keys.pop(page))
