"""The scan on a GPU: four launches, nothing read back to the host, shapes that depend on b, s and D alone."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from megatron_multiverse.structure import MAX_DEPTH

from ..multiverse_attention.tiles import FIRST, LAST, TILE, TileBounds
from ..multiverse_attention.triton_tiles import tile_lists_triton
from .scan import StructureScan
from .triton_documents import documents_kernel
from .triton_expand import expand_kernel
from .triton_tags import tags_kernel

CHUNK = 256
"""Tokens per program of the launches over tokens: a multiple of TILE."""
BLOCK = 512
BORDERS = 128
"""How many tags, and borders of a level, the program of a document takes at a time."""
CHAINED_TILES = 512
"""Up to this many tiles per row the launch of the tile lists is chained, too. With more, its programs would wait on the
GPU for longer than the early launch saves."""


def structure_scan_triton(
    ids: Tensor,
    documents: Tensor,
    tag_ids: Tensor,
    *,
    chunk: int = CHUNK,
    block: int = BLOCK,
    borders: int = BORDERS,
    chained: bool | None = None,
) -> StructureScan:
    """Same contract as `structure_scan`.

    Args:
        chunk, block, borders: see CHUNK, BLOCK and BORDERS.
        chained: each launch may begin while the one before still runs, and waits where it needs its results
            (programmatic dependent launch); default: on Hopper and newer.
    """
    batch, num_tokens = ids.shape
    num_documents = documents.shape[1]
    chunks, tiles = num_tokens // chunk + 1, -(-num_tokens // TILE)
    # Each value of these compiles the kernels again, so they are rounded up to a few powers of two.
    most_documents = max(32, triton.next_power_of_2(num_documents))
    most_chunks = max(64, triton.next_power_of_2(chunks))
    if chained is None:
        chained = ids.is_cuda and torch.cuda.get_device_capability(ids.device)[0] >= 9
    follows = {"CHAINED": True, "launch_pdl": True} if chained else {"CHAINED": False}

    def empty(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=ids.device)

    tags, counts = empty(batch, chunks, chunk), empty(batch, chunks)
    before = empty(batch, num_tokens + 1)
    rows_of_16 = -(-(num_tokens + 4 * num_documents) // 16)
    capacity = 16 * rows_of_16
    # What the launches hand on to each other; `documents_kernel` and `tags_kernel` say what it holds.
    lists, shifts, counted = (
        empty(batch, 4, MAX_DEPTH, capacity),
        empty(batch, 2, capacity),
        empty(batch, num_documents, MAX_DEPTH),
    )
    marks = empty(batch, num_documents, block + 1)
    info = empty(batch, 2, num_documents)
    malformed = empty(batch, num_documents, dtype=torch.uint8)
    position_ids, r = (empty(batch, num_tokens) for _ in range(2))
    r_low, r_high = (empty(batch, tiles) for _ in range(2))

    tags_kernel[(chunks, batch)](ids, tag_ids, tags, counts, before, num_tokens, ids.stride(0), chunks, CHUNK=chunk,
                                 CHAINED=chained, num_warps=4)  # fmt: skip
    documents_kernel[(num_documents, batch)](
        documents, tags, counts, before, marks, lists, counted, shifts, info, malformed, num_documents,
        num_tokens, rows_of_16, chunks, MAX_DEPTH=MAX_DEPTH, CHUNK=chunk, CHUNKS=most_chunks, DOCS=most_documents,
        BLOCK=block, BORDERS=borders, num_warps=8, **follows,
    )  # fmt: skip
    expand_kernel[(-(-num_tokens // chunk), batch)](
        documents, counts, before, shifts, info, position_ids, r, r_low, r_high, num_tokens,
        rows_of_16, num_documents, chunks, tiles, CHUNK=chunk, CHUNKS=most_chunks, DOCS=most_documents, TILE=TILE,
        FIRST=FIRST, LAST=LAST, num_warps=4, **follows,
    )  # fmt: skip
    bounds = TileBounds(r_low, r_high, None, None, num_tokens, TILE)
    tile_lists = tile_lists_triton(bounds, chained=chained and tiles <= CHAINED_TILES)
    return StructureScan(position_ids, r, malformed.view(torch.bool), tile_lists)
