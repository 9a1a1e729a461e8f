"""The definition, written for reading.

Shapes: b batch, h query heads, g key/value heads, s tokens, d head width.
"""

from __future__ import annotations

import torch
from torch import Tensor


def visibility(r: Tensor, index: Tensor | None = None) -> Tensor:
    """Which keys each query sees.

    Args:
        r: int labels [b, s], one per token; see README.md.
        index: int [b, s], place of each token in its sequence; default 0..s-1 (needed when permuted).

    Returns:
        bool [b, 1, s, s], True at (query i, key j) iff `index[j] <= index[i]` and `r[j] <= r[i]`.
    """
    visible = r[:, None, :, None] >= r[:, None, None, :]
    if index is None:
        return visible.tril_()
    return visible & (index[:, None, :, None] >= index[:, None, None, :])


def count_visible_pairs(r: Tensor, index: Tensor | None = None, *, rows: int = 1024) -> Tensor:
    """Number of visible (query, key) pairs over the batch, int64 scalar on the device.

    Args:
        r: int labels [b, s].
        index: int [b, s], see `visibility`.
        rows: queries looked at together; memory is b * rows * s bytes, never the whole mask.
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
        q: [b, h, s, d].
        k: [b, g, s, d]; head i of q uses head i // (h / g).
        v: [b, g, s, d].
        visible: bool, broadcastable to [b, h, s, s]; every query must see a key.
        softmax_scale: factor on the scores; default d ** -0.5.

    Returns:
        [b, h, s, d] in q's dtype.
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    repeats = q.shape[1] // k.shape[1]
    k, v = (x.to(dtype).repeat_interleave(repeats, dim=1) for x in (k, v))
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    scores = (q.to(dtype) @ k.transpose(-1, -2)) * scale
    weights = scores.masked_fill(~visible, -torch.inf).softmax(dim=-1)
    return (weights @ v).to(q.dtype)
