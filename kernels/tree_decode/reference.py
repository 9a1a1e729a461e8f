"""Attention of new tokens over a paged cache: the plain version, rows padded to rectangles."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

MOST_KEYS_CPU, MOST_KEYS_GPU = 4096, 1 << 17
"""Keys of one rectangle. On a CPU what was gathered for it should still be in the cache when attention reads it."""
MOST_PADDING = 512
"""Padded keys of one rectangle: they cost about as much as another rectangle."""


class RowGroup(NamedTuple):
    """Rows with about as many new tokens, padded to one rectangle of q queries and k keys."""

    q: int
    places: Tensor
    """int64 [rows, kv heads, k], where each key lies: (page * page_size + offset) * kv heads + head."""
    visible: Tensor
    """bool [rows, q, k]."""
    tokens: Tensor | None
    """int64 [rows * q], the token each query is; None: all tokens in order."""
    keep: Tensor | None
    """int64, which of the rows * q queries are not padding; None: all."""


def group_rows(
    pages: npt.NDArray[np.int32],
    lengths: npt.NDArray[np.int32],
    borders: npt.NDArray[np.int64],
    page_size: int,
    kv_heads: int,
    device: torch.device | str = "cpu",
) -> list[RowGroup]:
    """How `tree_decode_reference` pads the rows of a step: the same for all layers of a pass, so made once.

    Padding at most doubles the queries of a row (rows are grouped by powers of two); keys: see `MOST_PADDING`.
    Arguments as in `tree_decode_reference`, on the host.
    """
    most_keys = MOST_KEYS_CPU if torch.device(device).type == "cpu" else MOST_KEYS_GPU
    return [
        _group(rows, pages, lengths, borders, page_size, kv_heads, device)
        for rows in _alike(lengths, np.diff(borders), most_keys)
    ]


def _alike(
    lengths: npt.NDArray[np.int32], counts: npt.NDArray[np.int64], most_keys: int
) -> list[npt.NDArray[np.int64]]:
    """The rows of each rectangle."""
    buckets = np.where(counts == 1, 0, np.ceil(np.log2(counts)))
    order = np.lexsort((-lengths, buckets))
    found: list[list[int]] = []
    last = longest = padding = -1
    for row, bucket, length in zip(order.tolist(), buckets[order].tolist(), lengths[order].tolist(), strict=True):
        padding += longest - length
        if bucket == last and padding <= MOST_PADDING and (len(found[-1]) + 1) * longest <= most_keys:
            found[-1].append(row)
        else:
            found.append([row])
            last, longest, padding = bucket, length, 0
    return [np.sort(rows) for rows in found]


def _group(
    rows: npt.NDArray[np.int64],
    pages: npt.NDArray[np.int32],
    lengths: npt.NDArray[np.int32],
    borders: npt.NDArray[np.int64],
    page_size: int,
    kv_heads: int,
    device: torch.device | str,
) -> RowGroup:
    count, length = np.diff(borders)[rows], lengths[rows].astype(np.int64)
    q, k = int(count.max()), int(length.max())
    grid = pages[rows, : -(-k // page_size), None].astype(np.int64) * page_size + np.arange(page_size)
    place = np.arange(k)
    # A place after the end of a row is never read, not even with weight 0: it may hold anything, NaN included. The
    # row's first slot stands in for it.
    slots = np.where(place < length[:, None], grid.reshape(len(rows), -1)[:, :k], grid[:, 0, :1])
    query = np.arange(q)
    visible = place <= ((length - count)[:, None] + query)[:, :, None]
    tokens = borders[rows][:, None] + np.minimum(query, count[:, None] - 1)
    keep = np.flatnonzero(query < count[:, None])
    whole = len(rows) == len(lengths) and len(keep) == tokens.size
    return RowGroup(
        q=q,
        places=torch.from_numpy(slots[:, None] * kv_heads + np.arange(kv_heads)[:, None]).to(device),
        visible=torch.from_numpy(visible).to(device),
        tokens=None if whole else torch.from_numpy(tokens.reshape(-1)).to(device),
        keep=None if len(keep) == tokens.size else torch.from_numpy(keep).to(device),
    )


def tree_decode_reference(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    pages: Tensor,
    lengths: Tensor,
    borders: Tensor,
    softmax_scale: float,
    *,
    groups: Sequence[RowGroup] | None = None,
) -> Tensor:
    """Attend from the new tokens of several branches ("rows") to the cached tokens each of them sees.

    The new tokens of a row are the last it sees, and their keys are in the cache already. Rows share pages freely (a
    fork shares its prefix); the order of pages does not matter, but only the last one of a row may be partly filled.

    Args:
        query: ``[tokens, heads, head dim]``, rotary applied, the tokens of one row after those of the other.
        keys: ``[pages, page_size, kv heads, head dim]``, the cache of one layer, rotary applied.
        values: same shape as `keys`.
        pages: int32 ``[rows, p]``, pages of each row; what follows its last one is never looked at.
        lengths: int32 ``[rows]``, tokens the last token of each row sees, itself included.
        borders: int64 ``[rows + 1]``, row i has the queries [borders[i], borders[i + 1]), at least one.
        softmax_scale: factor on the scores.
        groups: what `group_rows` made of pages, lengths and borders; by default it is made here, which waits for the
            device.

    Returns:
        ``[tokens, heads, head dim]`` in the type of `query`.
    """
    if groups is None:
        host_pages, host_lengths, host_borders = (x.cpu().numpy() for x in (pages, lengths, borders))
        groups = group_rows(host_pages, host_lengths, host_borders, keys.shape[1], keys.shape[2], keys.device)
    return attend_groups(query, keys, values, groups, softmax_scale)


def attend_groups(
    query: Tensor, keys: Tensor, values: Tensor, groups: Sequence[RowGroup], softmax_scale: float
) -> Tensor:
    """`tree_decode_reference` with the rows already padded to rectangles."""
    out = torch.empty_like(query)
    for group in groups:
        part = query if group.tokens is None else query.index_select(0, group.tokens)
        got = _attend(
            part.view(-1, group.q, *query.shape[1:]), keys.flatten(0, 2), values.flatten(0, 2), group, softmax_scale
        )
        if group.tokens is None:
            return got
        if group.keep is None:
            out.index_copy_(0, group.tokens, got)
        else:
            out.index_copy_(0, group.tokens.index_select(0, group.keep), got.index_select(0, group.keep))
    return out


def _attend(query: Tensor, keys: Tensor, values: Tensor, group: RowGroup, softmax_scale: float) -> Tensor:
    """One rectangle: query [rows, q, heads, dim], keys and values [slots * kv heads, dim] -> [rows * q, heads, dim]."""
    rows, q, heads, dim = query.shape
    kv_heads, k = group.places.shape[1:]
    per_kv_head = heads // kv_heads
    # The query heads that share a kv head become further queries of it, so keys are never repeated.
    if q == 1:
        folded = query.view(rows, kv_heads, per_kv_head, dim)
    else:
        folded = query.view(rows, q, kv_heads, per_kv_head, dim).permute(0, 2, 3, 1, 4).flatten(2, 3)
    # Gathered head by head: attention over contiguous keys takes three quarters of the time on a CPU.
    place = group.places.reshape(-1)
    row_keys = keys.index_select(0, place).view(rows, kv_heads, k, dim)
    row_values = values.index_select(0, place).view(rows, kv_heads, k, dim)
    mask = group.visible if per_kv_head == 1 or q == 1 else group.visible.repeat(1, per_kv_head, 1)
    out = torch.nn.functional.scaled_dot_product_attention(
        folded, row_keys, row_values, attn_mask=mask[:, None], scale=softmax_scale
    )
    if q == 1:
        return out.reshape(rows, heads, dim)
    return out.view(rows, kv_heads, per_kv_head, q, dim).permute(0, 3, 1, 2, 4).reshape(rows * q, heads, dim)
