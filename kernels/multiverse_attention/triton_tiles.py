"""Tile bounds and tile lists in one Triton launch each; `tiles.py` holds the definition."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import cuda

from .tiles import FIRST, LAST, MAX_TILES, TILE, TileBounds, TileList, TileLists


@triton.jit
def _bounds_kernel(labels_ptr, low_ptr, high_ptr, num_tokens, row_stride, tiles, SIZE: tl.constexpr,
                   LANES: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr):  # fmt: skip
    """Program (tile, row): the smallest and the largest label of the real tokens of one tile of SIZE tokens."""
    # LANES is SIZE rounded up to a power of two. Padding never decides: it counts as LAST for the minimum and as FIRST
    # for the maximum.
    tile, batch = tl.program_id(0), tl.program_id(1)
    lane = tl.arange(0, LANES)
    token = tile * SIZE + lane
    real = (token < num_tokens) & (lane < SIZE)
    row = labels_ptr + batch.to(tl.int64) * row_stride
    low = tl.min(tl.load(row + token, mask=real, other=LAST), axis=0)
    high = tl.max(tl.load(row + token, mask=real, other=FIRST), axis=0)
    tl.store(low_ptr + batch * tiles + tile, low)
    tl.store(high_ptr + batch * tiles + tile, high)


@triton.jit
def _row_of_lists(own, batch, own_r_low, own_r_high, own_i_low, own_i_high, r_low, r_high, i_low, i_high,
                  counts_ptr, indices_ptr, batch_size, rows, columns, whole_keys, OF_QUERY: tl.constexpr,
                  HAS_INDEX: tl.constexpr, ONE_SET: tl.constexpr, SIZE: tl.constexpr, OTHER_SIZE: tl.constexpr,
                  CHUNK: tl.constexpr):  # fmt: skip
    """Write the partial and the full list of one tile: the tiles of the other side that it meets.

    The same code lists the key tiles of a query tile (OF_QUERY) and the query tiles of a key tile; the tests below are
    those of `tiles.tile_classes`, seen from either side.

    Args:
        own, batch: number of the tile among the `rows` tiles of its side, and the row of the batch.
        own_r_low, own_r_high, own_i_low, own_i_high: bounds of r and of index, int32 [b, rows], of the tile's side.
        r_low, r_high, i_low, i_high: the same of the other side, [b, columns].
        counts_ptr, indices_ptr: the lists, [2, b, rows] and [2, b, rows, columns], first the partial ones.
        whole_keys: key tiles without padding.
        HAS_INDEX: tokens have an index; otherwise they stand in their order, and i_low and i_high are not read.
        ONE_SET: queries and keys are the same tokens in tiles of the same size.
        SIZE, OTHER_SIZE: tokens of a tile, of this side and of the other.
        CHUNK: tiles of the other side that are looked at together.
    """
    my_r_low, my_r_high = tl.load(own_r_low + batch * rows + own), tl.load(own_r_high + batch * rows + own)
    if HAS_INDEX:
        my_i_low, my_i_high = tl.load(own_i_low + batch * rows + own), tl.load(own_i_high + batch * rows + own)
    start = batch * columns
    # The rows of the two lists that are written. int64, since [b, rows, columns] may have more than 2^31 entries.
    row = batch.to(tl.int64) * rows + own
    full_row = row + batch_size * rows
    # Two counts in one number, so that one prefix sum serves both lists: partial tiles, and full ones << 16.
    found = tl.zeros((), tl.int32)
    # Tokens in their order: tiles above the diagonal are empty, so a query tile looks no further than its own last
    # token, and a key tile starts at its own first token, rounded down to a whole chunk.
    first, last = 0, columns
    if not HAS_INDEX:
        if OF_QUERY:
            last = tl.minimum(columns, tl.cdiv((own + 1) * SIZE, OTHER_SIZE))
        else:
            first = own * SIZE // OTHER_SIZE // CHUNK * CHUNK
    for chunk in range(first, last, CHUNK):
        other = chunk + tl.arange(0, CHUNK)
        inside = other < columns
        o_r_low = tl.load(r_low + start + other, mask=inside, other=0)
        o_r_high = tl.load(r_high + start + other, mask=inside, other=0)
        # By r alone: a tile is full if the largest r of its keys is not above the smallest r of its queries, and empty
        # if the smallest r of its keys is above the largest r of its queries. A key tile with padding is never full.
        if OF_QUERY:
            full, empty = o_r_high <= my_r_low, o_r_low > my_r_high
            full &= other < whole_keys
        else:
            full, empty = my_r_high <= o_r_low, my_r_low > o_r_high
            full &= own < whole_keys
        # The same by the order of the tokens: by their index, or by where the tiles begin and end.
        if HAS_INDEX:
            o_i_low = tl.load(i_low + start + other, mask=inside, other=0)
            o_i_high = tl.load(i_high + start + other, mask=inside, other=0)
            if OF_QUERY:
                full &= o_i_high <= my_i_low
                empty |= o_i_low > my_i_high
            else:
                full &= my_i_high <= o_i_low
                empty |= my_i_low > o_i_high
        else:
            if OF_QUERY:
                full &= (other + 1) * OTHER_SIZE - 1 <= own * SIZE
                empty |= other * OTHER_SIZE >= (own + 1) * SIZE
            else:
                full &= (own + 1) * SIZE - 1 <= other * OTHER_SIZE
                empty |= own * SIZE >= (other + 1) * OTHER_SIZE
        # What is neither full nor empty is partial; so is the diagonal, so that every query meets
        # itself.
        full = full & (empty == 0) & inside
        partial = (full == 0) & (empty == 0) & inside
        if ONE_SET:
            full &= other != own
            partial |= other == own
        # The exclusive prefix sum is the place of each tile in its list.
        both = partial.to(tl.int32) | full.to(tl.int32) << 16
        place = found + tl.cumsum(both, axis=0) - both
        tl.store(indices_ptr + row * columns + (place & 0xFFFF), other, mask=partial)
        tl.store(indices_ptr + full_row * columns + (place >> 16), other, mask=full)
        found += tl.sum(both, axis=0)
    tl.store(counts_ptr + row, found & 0xFFFF)
    tl.store(counts_ptr + full_row, found >> 16)


@triton.jit
def _lists_kernel(q_r_low, q_r_high, q_i_low, q_i_high, k_r_low, k_r_high, k_i_low, k_i_high,
                  q_counts, q_indices, k_counts, k_indices, q_tiles, k_tiles, whole_keys, batch_size,
                  HAS_INDEX: tl.constexpr, ONE_SET: tl.constexpr, Q_SIZE: tl.constexpr, K_SIZE: tl.constexpr,
                  CHUNK: tl.constexpr, CHAINED: tl.constexpr):  # fmt: skip
    """Program (own tile, batch, side): side 0 lists the key tiles of a query tile, side 1 the other way round.

    q_counts [2, b, t_q] and q_indices [2, b, t_q, t_k] hold the partial and the full lists of the query tiles, k_*
    those of the key tiles. The grid is as long as the longer side, so some programs of the other side do nothing.
    """
    # The bounds come from the launch before, which may still run.
    if CHAINED:
        cuda.gdc_wait()
    own, batch, side = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if side == 0:
        if own < q_tiles:
            _row_of_lists(own, batch, q_r_low, q_r_high, q_i_low, q_i_high, k_r_low, k_r_high, k_i_low, k_i_high,
                          q_counts, q_indices, batch_size, q_tiles, k_tiles, whole_keys, True,
                          HAS_INDEX, ONE_SET, Q_SIZE, K_SIZE, CHUNK)  # fmt: skip
    else:
        if own < k_tiles:
            _row_of_lists(own, batch, k_r_low, k_r_high, k_i_low, k_i_high, q_r_low, q_r_high, q_i_low, q_i_high,
                          k_counts, k_indices, batch_size, k_tiles, q_tiles, whole_keys, False,
                          HAS_INDEX, ONE_SET, K_SIZE, Q_SIZE, CHUNK)  # fmt: skip


def tile_bounds_triton(r: Tensor, index: Tensor | None = None, *, size: int = TILE, length: int = 0) -> TileBounds:
    """Same contract as `tile_bounds_reference`."""
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
                                       LANES=triton.next_power_of_2(size), FIRST=FIRST, LAST=LAST,
                                       num_warps=1)  # fmt: skip
        found += [low, high]
    r_low, r_high, index_low, index_high = found
    assert r_low is not None and r_high is not None
    return TileBounds(r_low, r_high, index_low, index_high, num_tokens, size)


def tile_lists_triton(bounds: TileBounds, keys: TileBounds | None = None, *, chained: bool = False) -> TileLists:
    """Same contract as `tile_lists_reference`.

    Args:
        chained: the launch may begin while the one before, which makes the bounds, still runs. That one must signal
            when this one may start (programmatic dependent launch, on Hopper and newer).

    Raises:
        ValueError: more than MAX_TILES tiles.
    """
    one_set = keys is None
    keys = bounds if keys is None else keys
    batch, rows = bounds.r_low.shape
    columns = keys.r_low.shape[1]
    if max(rows, columns) > MAX_TILES:
        raise ValueError(
            f"{rows} query tiles and {columns} key tiles: lists go up to {MAX_TILES}; use shorter sequences"
        )

    def space(*shape: int) -> Tensor:
        return torch.empty(2, batch, 1, *shape, dtype=torch.int32, device=bounds.r_low.device)

    q_counts, q_indices, k_counts, k_indices = space(rows), space(rows, columns), space(columns), space(columns, rows)
    _lists_kernel[(max(rows, columns), batch, 2)](
        bounds.r_low, bounds.r_high, bounds.index_low, bounds.index_high,
        keys.r_low, keys.r_high, keys.index_low, keys.index_high, q_counts, q_indices, k_counts, k_indices,
        rows, columns, keys.num_tokens // keys.size, batch,
        HAS_INDEX=bounds.index_low is not None, ONE_SET=one_set, Q_SIZE=bounds.size, K_SIZE=keys.size, CHUNK=256,
        CHAINED=chained, num_warps=1, **({"launch_pdl": True} if chained else {}),
    )  # fmt: skip
    return TileLists(
        TileList(q_counts[0], q_indices[0]), TileList(q_counts[1], q_indices[1]),
        TileList(k_counts[0], k_indices[0]), TileList(k_counts[1], k_indices[1]), bounds.size, keys.size,
    )  # fmt: skip
