"""Which tiles of the score matrix are fully visible, partly visible or empty: what the fast backends walk over.

Everything stays on the device; nothing is read back to the host, and shapes depend on the length alone.
Shapes: b batch, s tokens, t tiles = ceil(s / size).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .reference import visibility

TILE = 128
"""Side of a tile; what FlashAttention 4 and FlexAttention want on Hopper."""
LAST = torch.iinfo(torch.int32).max
"""Label and index of padding: a real query never sees it, padding sees itself."""
FIRST = torch.iinfo(torch.int32).min
EMPTY, PARTIAL, FULL = 0, 1, 2


@dataclass(frozen=True)
class TileList:
    """For each row of tiles (or column) the tiles of one class."""

    counts: Tensor
    """int32 [b, 1, t]."""
    indices: Tensor
    """int32 [b, 1, t, t]; the first `counts` entries of a row are valid and increase, the rest is 0."""


@dataclass(frozen=True)
class TileLists:
    """The tiles that attention visits, shared by all heads and layers of a microbatch."""

    q_partial: TileList
    """For each query tile the key tiles that are visible in part (the diagonal always is)."""
    q_full: TileList
    """For each query tile the key tiles that are visible as a whole."""
    k_partial: TileList
    """For each key tile the query tiles that see it in part."""
    k_full: TileList
    """For each key tile the query tiles that see it as a whole."""
    size: int

    @property
    def shape(self) -> tuple[int, int]:
        """(b, t)."""
        return self.q_partial.counts.shape[0], self.q_partial.counts.shape[-1]

    def fit(self, r: Tensor, length: int) -> bool:
        """Whether they are the lists of labels r [b, s] padded to `length` tokens, by shape."""
        return self.shape == (r.shape[0], length // TILE) and self.size == TILE


@dataclass(frozen=True)
class TileBounds:
    """Smallest and largest r (and index) of the real tokens of each tile, int32 [b, t].

    Padding counts as LAST for the smallest and as FIRST for the largest value, so it never decides anything.
    """

    r_low: Tensor
    r_high: Tensor
    index_low: Tensor | None
    index_high: Tensor | None
    num_tokens: int
    size: int


def pad_labels(labels: Tensor, length: int) -> Tensor:
    """int32 labels [b, s] (r or index) as [b, length], padding = LAST; contiguous."""
    padded = torch.full((labels.shape[0], length), LAST, dtype=torch.int32, device=labels.device)
    padded[:, : labels.shape[1]] = labels
    return padded


def tile_bounds_reference(r: Tensor, index: Tensor | None = None, *, size: int = TILE, length: int = 0) -> TileBounds:
    """Bounds of the tiles of r [b, s] (and index), with plain torch; `length` >= s adds tiles of padding."""
    num_tokens = r.shape[1]
    tiles = -(-max(num_tokens, length) // size)
    valid = torch.arange(tiles * size, device=r.device) < num_tokens

    def bounds(labels: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        if labels is None:
            return None, None
        padded = pad_labels(labels, tiles * size)
        low = padded.unflatten(1, (tiles, size)).amin(-1)
        return low, padded.masked_fill(~valid, FIRST).unflatten(1, (tiles, size)).amax(-1)

    r_low, r_high = bounds(r)
    assert r_low is not None and r_high is not None
    return TileBounds(r_low, r_high, *bounds(index), num_tokens, size)


def tile_classes(bounds: TileBounds) -> Tensor:
    """EMPTY, PARTIAL or FULL for every tile, uint8 [b, t (queries), t (keys)].

    Without `index` the classes are exact: below the diagonal every key is earlier, so all pairs are visible iff
    max r_K <= min r_Q and none is iff min r_K > max r_Q. With permuted tokens FULL is exact and EMPTY is
    sufficient: a tile without a visible pair may be PARTIAL, which costs time and no correctness.
    The diagonal is PARTIAL, so every row of tiles, padding too, has a key to see.
    """
    tiles = bounds.r_low.shape[1]
    number = torch.arange(tiles, device=bounds.r_low.device)
    whole = number < bounds.num_tokens // bounds.size  # key tiles without padding
    full = (bounds.r_high[:, None, :] <= bounds.r_low[:, :, None]) & whole
    empty = bounds.r_low[:, None, :] > bounds.r_high[:, :, None]
    if bounds.index_low is None or bounds.index_high is None:
        full &= number[None, :] < number[:, None]
        empty |= number[None, :] > number[:, None]
    else:
        full &= bounds.index_high[:, None, :] <= bounds.index_low[:, :, None]
        empty |= bounds.index_low[:, None, :] > bounds.index_high[:, :, None]
    classes = torch.where(empty, EMPTY, torch.where(full, FULL, PARTIAL)).to(torch.uint8)
    classes.diagonal(dim1=1, dim2=2).fill_(PARTIAL)
    return classes


def compact(chosen: Tensor) -> TileList:
    """The True columns of each row of bool [b, t, t], packed to the left."""
    place = chosen.cumsum(-1, dtype=torch.int64) - 1
    tiles = chosen.shape[-1]
    columns = torch.arange(tiles, dtype=torch.int32, device=chosen.device).expand_as(chosen)
    indices = torch.zeros((*chosen.shape[:-1], tiles + 1), dtype=torch.int32, device=chosen.device)
    indices.scatter_(-1, torch.where(chosen, place, tiles), columns)
    counts = chosen.sum(-1, dtype=torch.int32)
    return TileList(counts[:, None], indices[:, None, :, :tiles].contiguous())


def tile_lists_reference(bounds: TileBounds) -> TileLists:
    """The lists by plain torch, on any device."""
    classes = tile_classes(bounds)
    partial, full = classes == PARTIAL, classes == FULL
    of_keys = partial.transpose(1, 2), full.transpose(1, 2)
    return TileLists(compact(partial), compact(full), compact(of_keys[0]), compact(of_keys[1]), bounds.size)


def tile_lists(r: Tensor, index: Tensor | None = None, *, size: int = TILE, length: int = 0) -> TileLists:
    """The tiles that attention under labels r visits.

    Args:
        r: int32 [b, s].
        index: int32 [b, s] place of each token in its sequence, None for 0..s-1.
        size: side of a tile.
        length: at least s; rounded up to whole tiles. Tiles behind s hold padding.

    Returns:
        Lists over ceil(max(s, length) / size) tiles. On CUDA two kernel launches, no synchronisation.
    """
    if r.is_cuda:
        from .tiles_triton import tile_bounds_triton, tile_lists_triton

        return tile_lists_triton(tile_bounds_triton(r, index, size=size, length=length))
    return tile_lists_reference(tile_bounds_reference(r, index, size=size, length=length))


def tile_classes_brute_force(r: Tensor, index: Tensor | None = None, *, size: int = TILE) -> Tensor:
    """The definition of the classes, from the whole mask of the real tokens; uint8 [b, t, t]."""
    visible = visibility(r, index)[:, 0]
    tiles = -(-r.shape[1] // size)
    classes = torch.empty(r.shape[0], tiles, tiles, dtype=torch.uint8, device=r.device)
    for q in range(tiles):
        for k in range(tiles):
            tile = visible[:, q * size : (q + 1) * size, k * size : (k + 1) * size].flatten(1)
            kind = torch.where(tile.all(1), FULL, torch.where(tile.any(1), PARTIAL, EMPTY))
            padded_keys = (k + 1) * size > r.shape[1]
            classes[:, q, k] = torch.where(kind == FULL, PARTIAL, kind) if q == k or padded_keys else kind
    return classes
