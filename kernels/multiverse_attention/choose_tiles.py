"""Tile lists by whatever makes them fastest: Triton kernels for labels on a GPU, the reference for all others."""

from __future__ import annotations

from torch import Tensor

from .tiles import TILE, TileLists, tile_bounds_reference, tile_lists_reference


def tile_lists(
    r: Tensor,
    index: Tensor | None = None,
    key_r: Tensor | None = None,
    key_index: Tensor | None = None,
    *,
    size: int = TILE,
    query_size: int | None = None,
    length: int = 0,
    key_length: int = 0,
) -> TileLists:
    """The tiles that attention under labels r visits.

    Args:
        r: int32 [b, s_q].
        index: int32 [b, s_q] place of each token in its sequence, None for 0..s_q-1.
        key_r: int32 [b, s_k] labels of the keys where they are other tokens than the queries; then index and
            key_index are needed too.
        key_index: int32 [b, s_k] places of the keys.
        size: tokens of a key tile.
        query_size: tokens of a query tile, if not `size`.
        length: make tiles for at least this many queries; those after s_q are padding.
        key_length: the same for the keys, if they are other tokens than the queries.

    Returns:
        Lists over ceil(max(s_q, length) / query_size) times ceil(max(s_k, key_length) / size) tiles. On CUDA one
        kernel launch per label tensor (and per size) and one for the lists, no synchronisation.
    """
    make_bounds, make_lists = tile_bounds_reference, tile_lists_reference
    if r.is_cuda:
        from .triton_tiles import tile_bounds_triton, tile_lists_triton

        make_bounds, make_lists = tile_bounds_triton, tile_lists_triton
    bounds = make_bounds(r, index, size=query_size or size, length=length)
    if key_r is None and bounds.size == size:
        return make_lists(bounds)
    if key_r is None:
        key_r, key_index, key_length = r, index, length
    return make_lists(bounds, make_bounds(key_r, key_index, size=size, length=key_length))
