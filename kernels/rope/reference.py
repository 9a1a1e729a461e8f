"""Rotary embedding (Su et al., 2104.09864), half-rotation layout, position ids given per token."""

from __future__ import annotations

import torch
from torch import Tensor


def inverse_frequencies(dim: int, base: float, device: torch.device | str, dtype: torch.dtype) -> Tensor:
    """base ** (-2i / dim) for i in 0..dim/2-1, shape [dim / 2]."""
    exponents = torch.arange(0, dim, 2, dtype=torch.int64, device=device).to(dtype) / dim
    return 1.0 / (base**exponents)


def rope_angles(position_ids: Tensor, inv_freq: Tensor) -> Tensor:
    """Angles [s, b, 1, dim], both halves alike (megatron-core's table), from position ids [b, s]."""
    half = position_ids.t().to(inv_freq.dtype)[..., None] * inv_freq
    return torch.cat((half, half), dim=-1)[:, :, None, :]


def rope_reference(x: Tensor, angles: Tensor) -> Tensor:
    """Rotate x [s, b, h, dim] by angles [s, b, 1, dim]."""
    first, second = x.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return x * angles.cos().to(x.dtype) + turned * angles.sin().to(x.dtype)
