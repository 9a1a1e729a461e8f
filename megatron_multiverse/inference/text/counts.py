"""Which tokens a branch sees, and how often each was drawn: what penalties ask."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]


class TokenCounts:
    """How often each token was drawn in what a branch sees; 0 for tokens of the prompt alone.

    Args:
        prompt: tokens that were given.
    """

    def __init__(self, prompt: Iterable[int] = ()) -> None:
        given = list(dict.fromkeys(prompt))
        self._place = {token: place for place, token in enumerate(given)}
        self._table: Ints = np.zeros((2, max(16, 2 * len(given))), dtype=np.int64)
        self._table[0, : len(given)] = given

    @property
    def ids(self) -> Ints:
        """int64 [n], each token once: a view."""
        return self._table[0, : len(self._place)]

    @property
    def counts(self) -> Ints:
        """int64 [n], how often each was drawn: a view."""
        return self._table[1, : len(self._place)]

    def add(self, token: int, count: int = 1) -> None:
        """The token was drawn, `count` times."""
        place = self._place.setdefault(token, len(self._place))
        if place == self._table.shape[1]:
            self._table = np.concatenate((self._table, np.zeros_like(self._table)), axis=1)
        self._table[0, place] = token
        self._table[1, place] += count

    def copy(self) -> TokenCounts:
        """What a path begins with."""
        copied = TokenCounts()
        copied._place, copied._table = dict(self._place), self._table.copy()
        return copied

    def join(self, paths: Sequence[TokenCounts]) -> None:
        """Add what paths drew that began with a copy of these counts."""
        before = dict(zip(self.ids.tolist(), self.counts.tolist(), strict=True))
        for path in paths:
            for token, count in zip(path.ids.tolist(), path.counts.tolist(), strict=True):
                if drawn := count - before.get(token, 0):
                    self.add(token, drawn)
