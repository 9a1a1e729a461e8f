"""The scan by the parser and the layout of `structure/`, which hold the definition.

A scan reads tags alone, but the parser also wants one newline in each gap and a label in each outline and path, and
where those are missing it reads tags as text. So each response is handed to it in the plainest spelling: its tags in
their order, a newline in each gap, and the same label everywhere. The spans that come back are moved to where the tags
really stand.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_multiverse.structure import (
    MAX_DEPTH,
    TAGS,
    BlockSpan,
    Document,
    Layout,
    PathSpan,
    StructureVocab,
    Tag,
    lay_out,
    pack_layouts,
    parse,
)

from ..multiverse_attention.tiles import TILE, tile_bounds_reference, tile_lists_reference
from .scan import StructureScan

_NEWLINE, _LABEL = len(TAGS), len(TAGS) + 1
_VOCAB = StructureVocab(tuple(Tag), _NEWLINE, {_LABEL: "1:"})
"""The vocabulary of the plainest spelling: here a tag's id is its kind."""


def structure_scan_reference(ids: Tensor, documents: Tensor, tag_ids: Tensor) -> StructureScan:
    """Same contract as `structure_scan`, on any device, slowly."""
    kinds = {token: Tag(kind) for kind, token in enumerate(tag_ids.tolist())}
    rows = [_row(row, spans, kinds) for row, spans in zip(ids.tolist(), documents.tolist(), strict=True)]
    position_ids = torch.stack([torch.from_numpy(layout.position_ids) for layout, _ in rows]).to(ids.device)
    r = torch.stack([torch.from_numpy(layout.r) for layout, _ in rows]).to(ids.device)
    malformed = torch.tensor([flags for _, flags in rows], dtype=torch.bool, device=ids.device)
    return StructureScan(position_ids, r, malformed, tile_lists_reference(tile_bounds_reference(r, size=TILE)))


def _row(ids: list[int], documents: list[list[int]], kinds: dict[int, Tag]) -> tuple[Layout, list[bool]]:
    """The layout of one row, and which of its documents are malformed."""
    starts = [0]
    for start, _ in documents[1:]:
        starts.append(max(starts[-1], min(max(start, 0), len(ids))))
    layouts, malformed = [], []
    for (_, response), start, end in zip(documents, starts, [*starts[1:], len(ids)], strict=True):
        first = min(max(response, start), end)
        blocks = _blocks([(i - start, kinds[ids[i]]) for i in range(first, end) if ids[i] in kinds])
        malformed.append(blocks is None)
        layouts.append(lay_out(Document(end - start, blocks=blocks or [])))
    return pack_layouts(layouts), malformed


def _blocks(tags: list[tuple[int, Tag]]) -> list[BlockSpan] | None:
    """The blocks of one response from its tags (index, kind); None if they break the grammar."""
    plainest: list[int] = []
    after: dict[int, int] = {}
    """Index after a tag in the plainest spelling -> index after it in the response."""
    for index, tag in tags:
        plainest += [_NEWLINE, tag]
        after[len(plainest)] = index + 1
        if tag in (Tag.OUTLINE, Tag.PATH):
            plainest += [_NEWLINE, _LABEL]
    document = parse(plainest, _VOCAB, strict=False, max_depth=MAX_DEPTH)
    # That paths are numbered 1, 2, 3 is a rule about labels, and all labels were made alike.
    if set(document.malformed) - {"label_order"}:
        return None
    return _moved(document.blocks, after)


def _moved(blocks: list[BlockSpan], after: dict[int, int]) -> list[BlockSpan]:
    """The blocks with their paths where `after` says. What the engine would force plays no part in a scan."""
    return [
        BlockSpan(
            start=after[block.start + 1] - 1,
            goal_end=after[block.goal_end],
            paths=[
                PathSpan(after[path.start], after[path.end], after[path.start], blocks=_moved(path.blocks, after))
                for path in block.paths
            ],
            end=after[block.end],
        )
        for block in blocks
    ]
