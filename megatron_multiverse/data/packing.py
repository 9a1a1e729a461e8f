"""Which documents share a training sequence: whole documents, greedy best fit, another mix every epoch."""

from __future__ import annotations

import logging
from bisect import bisect_left, insort
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import numpy.typing as npt

from megatron_multiverse.errors import DataError

logger = logging.getLogger(__name__)

Overlong = Literal["drop", "refuse"]
_OPEN_PACKS = 1024
"""Packs kept open at a time: enough to fill packs well, and few enough that packs stay near the shuffled order."""


@dataclass(frozen=True)
class Packing:
    """Packs of one epoch.

    Attributes:
        packs: document indices of each pack, in training order.
        dropped: documents left out because they are longer than a sequence.
        fill: share of the places in all packs that hold a token of a document, not padding.
    """

    packs: list[list[int]]
    dropped: int
    fill: float

    @cached_property
    def most_documents(self) -> int:
        """Documents of the fullest pack."""
        return max(map(len, self.packs))


def pack(
    lengths: npt.NDArray[np.int64],
    seq_length: int,
    *,
    seed: int,
    epoch: int,
    overlong: Overlong = "refuse",
    documents: npt.NDArray[np.int64] | None = None,
    name: Callable[[int], str] = "document {}".format,
) -> Packing:
    """Shuffle the documents and put each into the open pack where it leaves the least room.

    The result depends on the arguments alone, so that every rank and every resumed run gets the same packs.

    Args:
        lengths: tokens per document.
        seq_length: room of a pack in tokens.
        seed: seed of the run.
        epoch: number of the pass over the data; each has its own order.
        overlong: what happens to documents longer than `seq_length`: leave them out, or raise.
        documents: those that take part in this epoch; default all.
        name: what an error calls a document.

    Raises:
        DataError: a document is too long and `overlong` is "refuse", or no document is left.
    """
    too_long = np.flatnonzero(lengths > seq_length)
    if len(too_long) and overlong == "refuse":
        raise DataError(
            f"{len(too_long)} of {len(lengths)} documents are longer than seq_length ({seq_length}), the longest "
            f"({name(int(lengths.argmax()))}) has {int(lengths.max())} tokens; raise data.seq_length, or set "
            "data.overlong to drop, which leaves them out"
        )
    taking_part = np.arange(len(lengths)) if documents is None else documents
    own = lengths[taking_part]
    if not (own <= seq_length).any():
        raise DataError(
            f"no document of epoch {epoch} fits into seq_length ({seq_length}), the shortest has "
            f"{int(own.min(initial=lengths.max(initial=0)))} tokens; raise data.seq_length"
        )
    rng = np.random.default_rng([seed, epoch])
    packs: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (free tokens, pack), sorted
    for document in rng.permutation(taking_part).tolist():
        length = int(lengths[document])
        if length > seq_length:
            continue
        place = bisect_left(room, (length, -1))
        if place < len(room):
            free, number = room.pop(place)
            packs[number].append(document)
        else:
            free, number = seq_length, len(packs)
            packs.append([document])
        if free > length:
            insort(room, (free - length, number))
        if len(room) > _OPEN_PACKS:
            room.pop(0)  # close the pack with the least room
    used = int(own[own <= seq_length].sum())
    order = rng.permutation(len(packs)).tolist()
    fill = used / (len(packs) * seq_length)
    return Packing([packs[k] for k in order], int((own > seq_length).sum()), fill)
