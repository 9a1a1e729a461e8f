"""The scan on a GPU: five launches, nothing read back to the host, shapes by b, s and D alone."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from ..multiverse_attention.tiles import FIRST, LAST, TILE, TileBounds
from ..multiverse_attention.tiles_triton import tile_lists_triton
from .documents_triton import documents_kernel
from .expand_triton import expand_kernel, order_kernel
from .result import MAX_DEPTH, StructureScan
from .tags_triton import tags_kernel

CHUNK = 512
"""Tokens per program of the launches over tokens: a multiple of TILE."""
BLOCK = 256
"""Tags a document's program takes at a time: one per thread."""
CHUNKS = 128
SLOTS = 16
"""Chunks and tags of a chunk that a document's program copies at a time."""


def structure_scan_triton(
    ids: Tensor, documents: Tensor, tag_ids: Tensor, *, block: int = BLOCK, chunk: int = CHUNK, num_warps: int = 8
) -> StructureScan:
    """Same contract as `structure_scan`. `block`: tags that a program takes at a time."""
    batch, num_tokens = ids.shape
    num_documents = documents.shape[1]
    chunks, tiles = num_tokens // chunk + 1, -(-num_tokens // TILE)
    most_documents = max(32, triton.next_power_of_2(num_documents))  # few values: each compiles again

    def empty(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=ids.device)

    tags, counts = empty(batch, chunks, chunk), empty(batch, chunks)
    before = empty(batch, num_tokens + 1, dtype=torch.int16)
    rows_of_16 = -(-(num_tokens + 4 * num_documents) // 16)
    capacity = 16 * rows_of_16
    scratch, shifts = empty(7, batch, capacity), empty(3, batch, capacity)
    ends, info = empty(batch, capacity), empty(4, batch, num_documents)
    malformed = empty(batch, num_documents, dtype=torch.uint8)
    position_ids, r, segment_end = (empty(batch, num_tokens) for _ in range(3))
    r_low, r_high, order = (empty(batch, tiles) for _ in range(3))

    tags_kernel[(chunks, batch)](ids, tag_ids, tags, counts, before, num_tokens, ids.stride(0), chunks, CHUNK=chunk,
                                 num_warps=4)  # fmt: skip
    documents_kernel[(num_documents, batch)](
        documents, tags, counts, before, scratch, shifts, ends, info, malformed, num_documents, num_tokens,
        rows_of_16, chunks, batch, MAX_DEPTH=MAX_DEPTH, CHUNK=chunk, CHUNKS=CHUNKS, SLOTS=SLOTS, DOCS=most_documents,
        BLOCK=block, num_warps=num_warps,
    )  # fmt: skip
    expand_kernel[(-(-num_tokens // chunk), batch)](
        counts, before, shifts, ends, info, position_ids, r, segment_end, r_low, r_high, num_tokens, rows_of_16,
        num_documents, chunks, tiles, batch, CHUNK=chunk, CHUNKS=CHUNKS, DOCS=most_documents, TILE=TILE,
        FIRST=FIRST, LAST=LAST, num_warps=4,
    )  # fmt: skip
    lists = tile_lists_triton(TileBounds(r_low, r_high, None, None, num_tokens, TILE))
    own = 8
    order_kernel[(-(-tiles // own), batch)](lists.q_partial.counts, lists.q_full.counts, order, tiles, OWN=own,
                                            CHUNK=256, num_warps=4)  # fmt: skip
    return StructureScan(position_ids, r, segment_end, malformed.view(torch.bool), lists, order)
