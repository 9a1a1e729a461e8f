"""Tile bounds and tile lists in one Triton launch each; `tiles.py` has the definition."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tiles import FIRST, LAST, TILE, TileBounds, TileList, TileLists


@triton.jit
def _bounds_kernel(labels_ptr, low_ptr, high_ptr, num_tokens, row_stride, tiles, SIZE: tl.constexpr,
                   FIRST: tl.constexpr, LAST: tl.constexpr):  # fmt: skip
    tile, batch = tl.program_id(0), tl.program_id(1)
    token = tile * SIZE + tl.arange(0, SIZE)
    real = token < num_tokens
    row = labels_ptr + batch.to(tl.int64) * row_stride
    low = tl.min(tl.load(row + token, mask=real, other=LAST), axis=0)
    high = tl.max(tl.load(row + token, mask=real, other=FIRST), axis=0)
    tl.store(low_ptr + batch * tiles + tile, low)
    tl.store(high_ptr + batch * tiles + tile, high)


@triton.jit
def _lists_kernel(r_low, r_high, index_low, index_high, counts_ptr, indices_ptr, tiles, whole_tiles, batch_size,
                  HAS_INDEX: tl.constexpr, CHUNK: tl.constexpr):  # fmt: skip
    """Program (own tile, batch, side): side 0 lists the key tiles of a query tile, side 1 the other way round.

    counts [4, b, t] and indices [4, b, t, t] hold q_partial, q_full, k_partial, k_full.
    """
    own, batch, side = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    of_query = side == 0
    start = batch * tiles
    own_r_low, own_r_high = tl.load(r_low + start + own), tl.load(r_high + start + own)
    if HAS_INDEX:
        own_i_low, own_i_high = tl.load(index_low + start + own), tl.load(index_high + start + own)
    row = (side * 2 * batch_size + batch).to(tl.int64) * tiles + own  # of the partial list
    full_row = row + batch_size * tiles
    num_partial = tl.zeros((), tl.int32)
    num_full = tl.zeros((), tl.int32)
    for chunk in range(0, tiles, CHUNK):
        other = chunk + tl.arange(0, CHUNK)
        inside = other < tiles
        o_r_low = tl.load(r_low + start + other, mask=inside, other=0)
        o_r_high = tl.load(r_high + start + other, mask=inside, other=0)
        full = tl.where(of_query, o_r_high <= own_r_low, own_r_high <= o_r_low)
        empty = tl.where(of_query, o_r_low > own_r_high, own_r_low > o_r_high)
        if HAS_INDEX:
            o_i_low = tl.load(index_low + start + other, mask=inside, other=0)
            o_i_high = tl.load(index_high + start + other, mask=inside, other=0)
            full &= tl.where(of_query, o_i_high <= own_i_low, own_i_high <= o_i_low)
            empty |= tl.where(of_query, o_i_low > own_i_high, own_i_low > o_i_high)
        else:
            full &= tl.where(of_query, other < own, own < other)
            empty |= tl.where(of_query, other > own, own > other)
        full &= tl.where(of_query, other < whole_tiles, own < whole_tiles)  # no padding among the keys
        diagonal = other == own
        partial = (diagonal | ((full == 0) & (empty == 0))) & inside
        full = full & (empty == 0) & (diagonal == 0) & inside
        place = num_partial + tl.cumsum(partial.to(tl.int32), axis=0) - 1
        tl.store(indices_ptr + row * tiles + place, other, mask=partial)
        full_place = num_full + tl.cumsum(full.to(tl.int32), axis=0) - 1
        tl.store(indices_ptr + full_row * tiles + full_place, other, mask=full)
        num_partial += tl.sum(partial.to(tl.int32), axis=0)
        num_full += tl.sum(full.to(tl.int32), axis=0)
    tl.store(counts_ptr + row, num_partial)
    tl.store(counts_ptr + full_row, num_full)


def tile_bounds_triton(r: Tensor, index: Tensor | None = None, *, size: int = TILE, length: int = 0) -> TileBounds:
    """Same contract as `tile_bounds_reference`; size must be a power of two."""
    batch, num_tokens = r.shape
    tiles = -(-max(num_tokens, length) // size)
    found: list[Tensor | None] = []
    for labels in (r, index):
        if labels is None:
            found += [None, None]
            continue
        labels = labels.to(torch.int32)
        if labels.stride(1) != 1:
            labels = labels.contiguous()
        low, high = (torch.empty(batch, tiles, dtype=torch.int32, device=r.device) for _ in range(2))
        _bounds_kernel[(tiles, batch)](labels, low, high, num_tokens, labels.stride(0), tiles, SIZE=size,
                                       FIRST=FIRST, LAST=LAST, num_warps=1)  # fmt: skip
        found += [low, high]
    r_low, r_high, index_low, index_high = found
    assert r_low is not None and r_high is not None
    return TileBounds(r_low, r_high, index_low, index_high, num_tokens, size)


def tile_lists_triton(bounds: TileBounds) -> TileLists:
    """Same contract as `tile_lists_reference`."""
    batch, tiles = bounds.r_low.shape
    counts = torch.empty(4, batch, 1, tiles, dtype=torch.int32, device=bounds.r_low.device)
    indices = torch.zeros(4, batch, 1, tiles, tiles, dtype=torch.int32, device=bounds.r_low.device)
    chunk = min(1024, triton.next_power_of_2(tiles))
    _lists_kernel[(tiles, batch, 2)](
        bounds.r_low, bounds.r_high, bounds.index_low, bounds.index_high, counts, indices, tiles,
        bounds.num_tokens // bounds.size, batch, HAS_INDEX=bounds.index_low is not None, CHUNK=chunk, num_warps=4,
    )  # fmt: skip
    partial, full, k_partial, k_full = (TileList(counts[n], indices[n]) for n in range(4))
    return TileLists(partial, full, k_partial, k_full, bounds.size)
