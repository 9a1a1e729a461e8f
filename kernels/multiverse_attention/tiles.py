"""Which tiles of the score matrix are fully visible, partly visible or empty. The fast backends walk over these lists.

Everything stays on the device; nothing is read back to the host, and shapes depend on the length alone.
Queries and keys are the same tokens, or (context parallelism) two sets that bring their own labels and indices.
Shapes: b batch, s tokens, t tiles = ceil(s / size); t_q and t_k where queries and keys differ.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .reference import visibility

TILE = 128
"""Side of a tile, as FlashAttention 4 and FlexAttention want it on Hopper."""
MAX_TILES = (1 << 15) - 1
"""Most tiles of a sequence (4M tokens): kernels pack two counts into an int32. Lists of that many would take 17 GB."""
LAST = torch.iinfo(torch.int32).max
"""Label and index of padding: no real query sees such a key, and a padded query sees at least itself."""
FIRST = torch.iinfo(torch.int32).min
"""Counts as the largest label of a tile that holds nothing but padding."""
EMPTY, PARTIAL, FULL = 0, 1, 2


@dataclass(frozen=True)
class TileList:
    """For each query tile the key tiles of one class, or for each key tile the query tiles."""

    counts: Tensor
    """int32 [b, 1, t_q], for key tiles [b, 1, t_k]."""
    indices: Tensor
    """int32 [b, 1, t_q, t_k], for key tiles [b, 1, t_k, t_q]; the first `counts` entries of a row are valid and
    increase, the others are unspecified."""

    def valid(self) -> Tensor:
        """The indices, with -1 in place of the unspecified entries, so that two lists can be compared."""
        place = torch.arange(self.indices.shape[-1], device=self.indices.device)
        return self.indices.masked_fill(place >= self.counts[..., None], -1)


@dataclass(frozen=True)
class TileLists:
    """The tiles that attention visits, shared by all heads and layers of a microbatch."""

    q_partial: TileList
    """For each query tile the key tiles that are visible in part. If queries and keys are the same tokens, the diagonal
    tile counts as one of them."""
    q_full: TileList
    """For each query tile the key tiles that are visible as a whole."""
    k_partial: TileList
    """For each key tile the query tiles that see it in part."""
    k_full: TileList
    """For each key tile the query tiles that see it as a whole."""
    query_size: int
    """Tokens of a query tile."""
    key_size: int
    """Tokens of a key tile."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """(b, t_q, t_k)."""
        return self.q_partial.counts.shape[0], self.q_partial.counts.shape[-1], self.k_partial.counts.shape[-1]

    def fit(self, batch: int, queries: int, keys: int) -> bool:
        """Whether these lists have the shape of a batch padded to `queries` and `keys` tokens."""
        sizes = self.query_size, self.key_size
        return self.shape == (batch, queries // TILE, keys // TILE) and sizes == (TILE, TILE)

    def difference(self, other: TileLists) -> str | None:
        """Name of the first list in which two sets of lists differ, or None. They may lie on different devices, and
        unspecified entries may differ."""
        for name in ("q_partial", "q_full", "k_partial", "k_full"):
            mine, theirs = getattr(self, name), getattr(other, name)
            if not torch.equal(mine.counts.cpu(), theirs.counts.cpu()):
                return f"{name}.counts"
            if not torch.equal(mine.valid().cpu(), theirs.valid().cpu()):
                return f"{name}.indices"
        return None


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


def tile_classes(bounds: TileBounds, keys: TileBounds | None = None) -> Tensor:
    """EMPTY, PARTIAL or FULL for every tile, uint8 [b, t_q, t_k].

    On one set of tiles without `index` the classes are exact: below the diagonal every key is earlier, so all pairs
    are visible iff max r_K <= min r_Q and none is iff min r_K > max r_Q. Otherwise FULL is exact and EMPTY is
    sufficient: a tile without a visible pair may be PARTIAL, which costs time and no correctness.
    On one set of tiles the diagonal is PARTIAL, so every row of tiles, padding too, has a key to see.

    Args:
        bounds: of the queries.
        keys: of the keys where they are other tokens than the queries, both with an index then; or the same tokens in
            tiles of another size, both without.
    """
    one_set = keys is None
    keys = bounds if keys is None else keys
    rows, columns = bounds.r_low.shape[1], keys.r_low.shape[1]
    row, column = (torch.arange(count, device=bounds.r_low.device) for count in (rows, columns))
    whole = column < keys.num_tokens // keys.size  # key tiles without padding
    full = (keys.r_high[:, None, :] <= bounds.r_low[:, :, None]) & whole
    empty = keys.r_low[:, None, :] > bounds.r_high[:, :, None]
    if bounds.index_low is None or bounds.index_high is None:
        full &= (column[None, :] + 1) * keys.size - 1 <= row[:, None] * bounds.size
        empty |= column[None, :] * keys.size >= (row[:, None] + 1) * bounds.size
    else:
        assert keys.index_low is not None and keys.index_high is not None
        full &= keys.index_high[:, None, :] <= bounds.index_low[:, :, None]
        empty |= keys.index_low[:, None, :] > bounds.index_high[:, :, None]
    classes = torch.where(empty, EMPTY, torch.where(full, FULL, PARTIAL)).to(torch.uint8)
    if one_set:
        classes.diagonal(dim1=1, dim2=2).fill_(PARTIAL)
    return classes


def compact(chosen: Tensor) -> TileList:
    """The True columns of each row of bool [b, rows, columns], packed to the left."""
    place = chosen.cumsum(-1, dtype=torch.int64) - 1
    width = chosen.shape[-1]
    columns = torch.arange(width, dtype=torch.int32, device=chosen.device).expand_as(chosen)
    indices = torch.zeros((*chosen.shape[:-1], width + 1), dtype=torch.int32, device=chosen.device)
    indices.scatter_(-1, torch.where(chosen, place, width), columns)
    counts = chosen.sum(-1, dtype=torch.int32)
    return TileList(counts[:, None], indices[:, None, :, :width].contiguous())


def tile_lists_reference(bounds: TileBounds, keys: TileBounds | None = None) -> TileLists:
    """The lists by plain torch, on any device."""
    classes = tile_classes(bounds, keys)
    partial, full = classes == PARTIAL, classes == FULL
    sizes = bounds.size, (keys or bounds).size
    of_keys = partial.transpose(1, 2), full.transpose(1, 2)
    return TileLists(compact(partial), compact(full), compact(of_keys[0]), compact(of_keys[1]), *sizes)


def write_order(lists: TileLists) -> tuple[Tensor, Tensor]:
    """The order in which key tiles add to the dQ of a query tile, so that the sum is the same bits in every run.

    For each entry (key tile n, query tile m) of the lists of key tiles it is the number of larger key tiles that m
    meets, so key tiles add in descending order. Each key tile starts at its diagonal tile and goes on to later queries,
    so the larger key tile has already gone past query tile m, and nobody waits. Plain torch, on any device.

    Returns:
        int32 tensors like `k_partial.indices` and `k_full.indices`; entries after the counts are unspecified.
    """
    batch, rows, columns = lists.shape
    device = lists.q_partial.counts.device
    met = torch.zeros(batch, rows, columns + 1, dtype=torch.int32, device=device)
    ones = torch.ones(batch, rows, columns, dtype=torch.int32, device=device)
    for found in (lists.q_partial, lists.q_full):
        columns_met = found.valid()[:, 0].long()
        met.scatter_(-1, torch.where(columns_met < 0, columns, columns_met), ones)
    met = met[..., :columns]
    larger = met.sum(-1, keepdim=True, dtype=torch.int32) - met.cumsum(-1, dtype=torch.int32)
    rank = larger.transpose(1, 2)

    def of(found: TileList) -> Tensor:
        return rank.gather(-1, found.valid()[:, 0].long().clamp_(min=0))[:, None].contiguous()

    return of(lists.k_partial), of(lists.k_full)


def tile_classes_brute_force(
    r: Tensor,
    index: Tensor | None = None,
    key_r: Tensor | None = None,
    key_index: Tensor | None = None,
    *,
    size: int = TILE,
    query_size: int | None = None,
) -> Tensor:
    """The definition of the classes, uint8 [b, t_q, t_k], from the whole mask of the real tokens; for tests."""
    visible = visibility(r, index, key_r, key_index)[:, 0]
    high = query_size or size
    rows, columns = -(-visible.shape[1] // high), -(-visible.shape[2] // size)
    classes = torch.empty(r.shape[0], rows, columns, dtype=torch.uint8, device=r.device)
    for q in range(rows):
        for k in range(columns):
            tile = visible[:, q * high : (q + 1) * high, k * size : (k + 1) * size].flatten(1)
            kind = torch.where(tile.all(1), FULL, torch.where(tile.any(1), PARTIAL, EMPTY))
            padded_keys = (k + 1) * size > visible.shape[2]
            diagonal = q == k and key_r is None and high == size
            classes[:, q, k] = torch.where(kind == FULL, PARTIAL, kind) if diagonal or padded_keys else kind
    return classes
