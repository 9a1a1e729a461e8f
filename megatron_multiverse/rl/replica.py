"""This rank's share of a run: which prompts it draws answers to, and with whom.

Tensor parallel ranks hold one model between them, a *replica*. Each replica draws, grades and trains answers to prompts
of its own. The first rank of a replica does what needs the text; the others run its engine's steps, and are given the
rows to train.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import distributed

from megatron_multiverse.model.mcore import data_parallel_rank, parallel_state, tensor_parallel_place
from megatron_multiverse.parallel.ranks import Ranks

T = TypeVar("T")


@dataclass(frozen=True)
class Replica:
    """See the module. The process groups have been made."""

    ranks: Ranks
    """Those of the run."""
    count: int = 1
    """Replicas."""
    number: int = 0
    """Which of them this rank belongs to."""
    is_first: bool = True
    """Whether this rank is the first of its replica."""
    size: int = 1
    """Ranks of a replica."""

    @classmethod
    def of(cls, ranks: Ranks) -> Replica:
        """This rank's, in megatron-core's process groups."""
        if ranks.size == 1:
            return cls(ranks)
        size, rank = tensor_parallel_place()
        return cls(ranks, ranks.size // size, data_parallel_rank(), rank == 0, size)

    def share(self, items: Sequence[T]) -> list[T]:
        """This replica's part of what the whole run is to do."""
        return list(items[self.number :: self.count])

    def all_of(self, items: Sequence[T]) -> list[T]:
        """What the first ranks of all replicas have; collective. Small values: they are pickled."""
        parts = self.ranks.gather(list(items) if self.is_first else [])
        return [item for part in parts for item in part]

    def from_first(self, value: T | None) -> T:
        """What the first rank of this replica gives; collective over the replica."""
        box: list[Any] = [value]
        if self.size > 1:
            group = parallel_state.get_model_parallel_group()
            distributed.broadcast_object_list(box, parallel_state.get_model_parallel_src_rank(), group=group)
        value = box[0]
        assert value is not None, "the first rank gives a value"
        return value
