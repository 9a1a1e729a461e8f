"""What a structure scan returns."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..multiverse_attention.tiles import TileLists


@dataclass(frozen=True)
class StructureScan:
    """Where the tokens of a batch stand. Shapes: b rows, s tokens, D documents."""

    position_ids: Tensor
    """int32 [b, s], from 0 in each document."""
    r: Tensor
    """int32 [b, s] visibility label: query i sees key j iff j <= i and r[j] <= r[i]."""
    malformed: Tensor
    """bool [b, D]: the response breaks the grammar, so the document is laid out as plain causal text."""
    lists: TileLists
    """The tiles of the score matrix that attention visits."""

    def difference(self, other: StructureScan) -> str | None:
        """Name of the first field in which two scans differ, or None. They may lie on different devices."""
        for name in ("malformed", "position_ids", "r"):
            mine, theirs = getattr(self, name).cpu(), getattr(other, name).cpu()
            if mine.dtype != theirs.dtype or not torch.equal(mine, theirs):
                return name
        return self.lists.difference(other.lists)
