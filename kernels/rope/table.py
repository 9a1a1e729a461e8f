"""Cosines and sines of every token of a microbatch, once for all layers, and plain rotations by them."""

from __future__ import annotations

import torch
from torch import Tensor


def rope_table(position_ids: Tensor, inv_freq: Tensor) -> Tensor:
    """cos and sin of every token's angles.

    Args:
        position_ids: int [b, s].
        inv_freq: float32 (float64 for float64 models) [dim / 2].

    Returns:
        [b, s, dim] in inv_freq's dtype: cosines in the first half of the last axis, sines in the second.
    """
    angles = position_ids[..., None].to(inv_freq.dtype) * inv_freq
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


def rotate_by_table(x: Tensor, table: Tensor) -> Tensor:
    """Rotate x [s, b, h, dim] by a `rope_table` [b, s, dim], in the wider of both dtypes; plain torch."""
    cos, sin = table.transpose(0, 1)[:, :, None].chunk(2, dim=-1)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def rotate_qkv_by_table(mixed: Tensor, table: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Split megatron-core's mixed projection and rotate q and k; plain torch, any device and float dtype.

    Args:
        mixed: [s, b, g, (h / g + 2) * dim]; per group its queries, its key, its value.
        table: [b, s, dim] by `rope_table`.

    Returns:
        q [s, b, h, dim], rotated; k [s, b, g, dim], rotated; v [s, b, g, dim], a view of mixed.

    Raises:
        ValueError: shapes do not fit.
    """
    check_qkv(mixed, table)
    s, b, dim = *mixed.shape[:2], table.shape[2]
    q, k, v = mixed.split([mixed.shape[3] - 2 * dim, dim, dim], dim=-1)
    return rotate_by_table(q.reshape(s, b, -1, dim), table), rotate_by_table(k, table), v


def check_qkv(mixed: Tensor, table: Tensor) -> None:
    """Raise ValueError unless mixed [s, b, g, (h / g + 2) * dim] and table [b, s, dim] fit together."""
    dim = table.shape[-1]
    fits = mixed.ndim == 4 and table.shape == (*mixed.shape[1::-1], dim)
    if not fits or dim % 2 or mixed.shape[3] % dim or mixed.shape[3] < 3 * dim:
        raise ValueError(
            "mixed [s, b, g, (h / g + 2) * dim] and table [b, s, dim] do not fit: "
            f"{tuple(mixed.shape)}, {tuple(table.shape)}"
        )
