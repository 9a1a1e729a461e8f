"""The scan in plain Python: a parser over the tags of each document, then positions and labels per segment.

`structure/` holds the definition (it also reads gaps and labels, which do not change where tokens stand); this is
the same rule again over tags alone, in the words of the kernels' contract.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..multiverse_attention.tiles import TILE, tile_bounds_reference, tile_lists_reference
from .result import MAX_DEPTH, StructureScan

(THINK, END_THINK, PARALLEL, END_PARALLEL, GOAL, END_GOAL,
 OUTLINE, END_OUTLINE, PATH, END_PATH, CONCLUSION, END_CONCLUSION) = range(12)  # fmt: skip

Segment = tuple[int, int, int]
"""First token, position - index, r - index."""


class Malformed(Exception):
    """The tags of a document break the grammar."""


@dataclass
class Path:
    """Tokens [start, end) and the blocks among them."""

    start: int
    end: int
    blocks: list[Block] = field(default_factory=list)


@dataclass
class Block:
    """The paths of one parallel block; its region is [paths[0].start, paths[-1].end)."""

    paths: list[Path]


class _Reader:
    """Recursive descent over the (index, kind) of the tags of one response."""

    def __init__(self, tags: list[tuple[int, int]]) -> None:
        self.tags = tags
        self.place = 0

    def next_kind(self) -> int | None:
        return self.tags[self.place][1] if self.place < len(self.tags) else None

    def take(self, kind: int) -> int:
        """Read one tag of this kind; returns the index behind it."""
        if self.next_kind() != kind:
            raise Malformed
        self.place += 1
        return self.tags[self.place - 1][0] + 1

    def response(self) -> list[Block]:
        """text := (<Think> | </Think> | block)*, the two think tags once and in order or not at all."""
        blocks, thought = [], [THINK, END_THINK]
        while (kind := self.next_kind()) is not None:
            if kind == PARALLEL:
                blocks.append(self.block(1))
            elif thought and kind == thought[0]:
                self.take(thought.pop(0))
            else:
                raise Malformed
        if len(thought) == 1:
            raise Malformed
        return blocks

    def block(self, depth: int) -> Block:
        if depth > MAX_DEPTH:
            raise Malformed
        self.take(PARALLEL)
        self.take(GOAL)
        outlines = 0
        while outlines == 0 or self.next_kind() == OUTLINE:
            self.take(OUTLINE)
            self.take(END_OUTLINE)
            outlines += 1
        start, paths = self.take(END_GOAL), []
        for _ in range(outlines):
            self.take(PATH)
            blocks = []
            while self.next_kind() == PARALLEL:
                blocks.append(self.block(depth + 1))
            paths.append(Path(start, self.take(END_PATH), blocks))
            start = paths[-1].end
        for kind in (CONCLUSION, END_CONCLUSION, END_PARALLEL):
            self.take(kind)
        return Block(paths)


def _text(segments: list[Segment], start: int, end: int, blocks: list[Block], position: int, r: int) -> int:
    """Append the segments of [start, end); returns the position behind its last token."""
    for block in blocks:
        segments.append((start, position, r))
        region_start, region_end = block.paths[0].start, block.paths[-1].end
        anchor = region_start + position
        longest = anchor
        for path in block.paths:
            path_r = r + (region_end - path.end) - (path.start - region_start)
            behind = _text(segments, path.start, path.end, path.blocks, anchor - path.start, path_r)
            longest = max(longest, behind)
        start, position = region_end, longest - region_end
    segments.append((start, position, r))
    return end + position


def _row(ids: list[int], documents: list[list[int]], tag_ids: list[int]) -> tuple[list[list[int]], list[bool]]:
    """Positions, labels and segment ends of one row, and which documents are malformed."""
    s = len(ids)
    kinds = {token: kind for kind, token in enumerate(tag_ids)}
    starts = [0]
    for start, _ in documents[1:]:
        starts.append(max(starts[-1], min(max(start, 0), s)))
    segments: list[Segment] = []
    malformed, cuts = [], []
    for d, start in enumerate(starts):
        end = starts[d + 1] if d + 1 < len(starts) else s
        response = min(max(documents[d][1], start), end)
        tags = [(i, kinds[ids[i]]) for i in range(response, end) if ids[i] in kinds]
        try:
            blocks = _Reader(tags).response()
            malformed.append(False)
        except Malformed:
            blocks = []
            malformed.append(True)
        _text(segments, start, end, blocks, -start, (s - end) - start)
        cuts.append(end)
    borders = sorted({start for start, _, _ in segments} | set(cuts))
    behind = dict(itertools.pairwise(borders))
    columns: list[list[int]] = [[], [], []]
    for (first, position, r), (last, _, _) in zip(segments, [*segments[1:], (s, 0, 0)], strict=True):
        columns[0] += range(first + position, last + position)
        columns[1] += range(first + r, last + r)
        columns[2] += [behind.get(first, s)] * (last - first)
    return columns, malformed


def structure_scan_reference(ids: Tensor, documents: Tensor, tag_ids: Tensor) -> StructureScan:
    """Same contract as `structure_scan`, on any device, slowly."""
    rows = [
        _row(row, spans, tag_ids.tolist())
        for row, spans in zip(ids.tolist(), documents.tolist(), strict=True)
    ]  # fmt: skip

    def column(k: int) -> Tensor:
        return torch.tensor([columns[k] for columns, _ in rows], dtype=torch.int32, device=ids.device)

    r = column(1)
    lists = tile_lists_reference(tile_bounds_reference(r, size=TILE))
    malformed = torch.tensor([flags for _, flags in rows], dtype=torch.bool, device=ids.device)
    return StructureScan(column(0), r, column(2), malformed, lists)
