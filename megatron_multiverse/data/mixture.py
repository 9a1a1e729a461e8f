"""Which documents an epoch has: more of the structured ones and fewer of the plain ones as training goes on.

The authors of Multiverse train eight epochs in which the share of structured rows grows from none to all
(`PAPER_SHARES`, arXiv 2506.09991), so that the model keeps how it reasoned before and learns the structure on top.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megatron_multiverse.errors import ConfigError

PAPER_SHARES = (0.0, 0.0, 0.1, 0.5, 0.5, 0.9, 1.0, 1.0)


@dataclass(frozen=True)
class Mixture:
    """Epoch e has `shares[e]` of the structured documents and the rest to one of the plain ones; the last share holds
    for all later epochs.

    Each kind is shuffled once, and an epoch goes on where the one before it ended, so that all documents of a kind are
    seen equally often, but for one time more or less.
    """

    shares: tuple[float, ...]
    num_structured: int
    """Documents below this number are structured."""
    num_documents: int
    """Those from there to this number are plain."""

    def documents(self, seed: int, epoch: int) -> npt.NDArray[np.int64]:
        """The documents of an epoch, int64, structured ones first. The same on every rank.

        Raises:
            ConfigError: there are none.
        """
        chosen = [self._of_kind(seed, epoch, plain) for plain in (False, True)]
        documents = np.concatenate(chosen)
        if len(documents) == 0:
            raise ConfigError(
                f"epoch {epoch} of data.mixture, with a share of {self._share(epoch)}, has no documents: there are "
                f"{self.num_structured} in data.data_prefixes and {self.num_documents - self.num_structured} in "
                "data.plain_prefixes"
            )
        return documents

    def _share(self, epoch: int) -> float:
        return self.shares[min(epoch, len(self.shares) - 1)]

    def _count(self, epoch: int, plain: bool) -> int:
        share = 1 - self._share(epoch) if plain else self._share(epoch)
        return round(share * (self.num_documents - self.num_structured if plain else self.num_structured))

    def _of_kind(self, seed: int, epoch: int, plain: bool) -> npt.NDArray[np.int64]:
        size, first = self.num_structured, 0
        if plain:
            size, first = self.num_documents - self.num_structured, self.num_structured
        if size == 0:
            return np.zeros(0, dtype=np.int64)
        start = sum(self._count(earlier, plain) for earlier in range(epoch))
        order = np.random.default_rng([seed, int(plain)]).permutation(size)
        taken: npt.NDArray[np.int64] = order[np.arange(start, start + self._count(epoch, plain)) % size] + first
        return taken
