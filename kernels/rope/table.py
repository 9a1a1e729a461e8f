"""Cosines and sines of every token of a microbatch, once for all layers."""

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
