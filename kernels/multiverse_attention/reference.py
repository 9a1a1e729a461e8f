"""The definition of the mask and of attention under it, written for reading.

Shapes: b batch, h query heads, g key/value heads, s tokens, d head width.
"""

from __future__ import annotations

import torch
from torch import Tensor


def visibility(
    r: Tensor, index: Tensor | None = None, key_r: Tensor | None = None, key_index: Tensor | None = None
) -> Tensor:
    """Which keys each query sees.

    Args:
        r: int labels [b, s_q], one per query; see README.md.
        index: int [b, s_q], place of each query in its sequence; default 0..s_q-1. A permuted
            sequence needs it.
        key_r: int labels [b, s_k] of the keys, where they are other tokens than the queries (context
            parallelism: local queries, all keys); then index and key_index are needed too.
        key_index: int [b, s_k], places of the keys.

    Returns:
        bool [b, 1, s_q, s_k], True at (query i, key j) iff `key_index[j] <= index[i]` and `key_r[j] <= r[i]`.
    """
    if key_r is None:
        visible = r[:, None, :, None] >= r[:, None, None, :]
        if index is None:
            return visible.tril_()
        return visible & (index[:, None, :, None] >= index[:, None, None, :])
    assert index is not None and key_index is not None, "keys of their own need index and key_index"
    visible = r[:, None, :, None] >= key_r[:, None, None, :]
    return visible & (index[:, None, :, None] >= key_index[:, None, None, :])


def count_visible_pairs(r: Tensor, index: Tensor | None = None, *, rows: int = 1024) -> Tensor:
    """Number of visible (query, key) pairs over the batch, int64 scalar on the device.

    Args:
        r: int labels [b, s].
        index: int [b, s], see `visibility`.
        rows: how many queries to look at together. This takes b * rows * s bytes, and never the whole mask.
    """
    num_tokens = r.shape[1]
    places = torch.arange(num_tokens, device=r.device)[None] if index is None else index
    pairs = torch.zeros((), dtype=torch.int64, device=r.device)
    for start in range(0, num_tokens, rows):
        queries = slice(start, start + rows)
        keys = slice(0, start + rows if index is None else num_tokens)
        seen = places[:, queries, None] >= places[:, None, keys]
        pairs += (seen & (r[:, queries, None] >= r[:, None, keys])).sum()
    return pairs


def multiverse_attention_reference(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor, softmax_scale: float | None = None
) -> Tensor:
    """Masked softmax attention by explicit matrices, in float32 or better.

    Args:
        q: [b, h, s_q, d].
        k: [b, g, s_k, d]; head i of q uses head i // (h / g).
        v: [b, g, s_k, d].
        visible: bool, broadcastable to [b, h, s_q, s_k].
        softmax_scale: factor on the scores; default d ** -0.5.

    Returns:
        [b, h, s_q, d] in q's dtype; 0 for a query that sees no key.
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    repeats = q.shape[1] // k.shape[1]
    k, v = (x.to(dtype).repeat_interleave(repeats, dim=1) for x in (k, v))
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    scores = (q.to(dtype) @ k.transpose(-1, -2)) * scale
    lonely = ~visible.any(-1, keepdim=True)
    weights = scores.masked_fill(~visible & ~lonely, -torch.inf).softmax(dim=-1).masked_fill(lonely, 0)
    return (weights @ v).to(q.dtype)
