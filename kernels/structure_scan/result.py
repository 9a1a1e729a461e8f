"""What the scan returns."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..multiverse_attention.tiles import TileLists

NUM_TAGS = 12
MAX_DEPTH = 8
"""Blocks around a token; deeper documents are laid out as causal and flagged."""


@dataclass(frozen=True)
class StructureScan:
    """Where the tokens of a batch stand. Shapes: b rows, s tokens, D documents, t = ceil(s / 128) tiles."""

    position_ids: Tensor
    """int32 [b, s], from 0 in each document."""
    r: Tensor
    """int32 [b, s] visibility label: query i sees key j iff j <= i and r[j] <= r[i]."""
    segment_end: Tensor
    """int32 [b, s] index behind the last token of the segment: positions and r are index + constant up to there."""
    malformed: Tensor
    """bool [b, D]: the response breaks the grammar; the document is laid out as causal."""
    lists: TileLists
    """Tiles that attention visits."""

    @property
    def work_order(self) -> Tensor:
        """int32 [b, t] query tiles, most tiles to visit first, the earlier first among equals; sorted on demand."""
        work = (self.lists.q_partial.counts + self.lists.q_full.counts)[:, 0]
        return work.argsort(dim=-1, descending=True, stable=True).to(torch.int32)

    def difference(self, other: StructureScan) -> str | None:
        """Name of the first field in which they differ, wherever they lie, or None."""
        for name in ("malformed", "position_ids", "r", "segment_end", "work_order"):
            mine, theirs = getattr(self, name).cpu(), getattr(other, name).cpu()
            if mine.dtype != theirs.dtype or not torch.equal(mine, theirs):
                return name
        return self.lists.difference(other.lists)
