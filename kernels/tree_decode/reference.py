"""Attention of new tokens over a paged cache: the plain version, batched over rows."""

from __future__ import annotations

import torch
from torch import Tensor


def tree_decode_reference(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    slot_table: Tensor,
    visible: Tensor,
    softmax_scale: float,
) -> Tensor:
    """Attend from the new tokens of R branches to the cached tokens each of them sees.

    Branches share slots freely (a fork shares its prefix); the order of slots in a row does not matter.

    Args:
        query: ``[rows, q, heads, head dim]``, rotary applied; rows shorter than q are padded.
        keys: ``[slots, kv heads, head dim]``, the cache of one layer, rotary applied.
        values: same shape as `keys`.
        slot_table: int64 ``[rows, k]``, cache slots of each row; padded with any slot that holds finite numbers.
        visible: bool ``[rows, q, k]``, True where the query sees the key; at least one True per query.
        softmax_scale: factor on the scores.

    Returns:
        ``[rows, q, heads, head dim]`` in the type of `query`; rows of padded queries carry no meaning.
    """
    rows, q, heads, dim = query.shape
    kv_heads = keys.shape[1]
    group = heads // kv_heads
    k = slot_table.shape[1]
    # The heads of one group become extra queries of their kv head, so keys are never repeated.
    folded = query.view(rows, q, kv_heads, group, dim).permute(0, 2, 3, 1, 4).reshape(rows, kv_heads, group * q, dim)
    table = slot_table.reshape(-1)
    row_keys = keys.index_select(0, table).view(rows, k, kv_heads, dim).transpose(1, 2)
    row_values = values.index_select(0, table).view(rows, k, kv_heads, dim).transpose(1, 2)
    mask = visible[:, None] if group == 1 or q == 1 else visible.repeat(1, group, 1)[:, None]
    out = torch.nn.functional.scaled_dot_product_attention(
        folded, row_keys, row_values, attn_mask=mask, scale=softmax_scale
    )
    return out.view(rows, kv_heads, group, q, dim).permute(0, 3, 1, 2, 4).reshape(rows, q, heads, dim)
