"""Rotary embedding (Su et al., 2104.09864), half-rotation layout, position ids given per token."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def inverse_frequencies(dim: int, base: float, device: torch.device | str, dtype: torch.dtype) -> Tensor:
    """base ** (-2i / dim) for i in 0..dim/2-1, shape [dim / 2]."""
    exponents = torch.arange(0, dim, 2, dtype=torch.int64, device=device).to(dtype) / dim
    return 1.0 / (base**exponents)


def llama3_frequencies(
    inv_freq: Tensor, *, factor: float, low_freq_factor: float, high_freq_factor: float, original_length: int
) -> Tensor:
    """Llama 3.1's long-context frequencies: slow ones divided by `factor`, fast ones kept, a ramp between them."""
    wavelength = 2 * math.pi / inv_freq
    ramp = (original_length / wavelength - low_freq_factor) / (high_freq_factor - low_freq_factor)
    ramped = (1 - ramp) * inv_freq / factor + ramp * inv_freq
    slow = wavelength > original_length / low_freq_factor
    fast = wavelength < original_length / high_freq_factor
    return torch.where(slow, inv_freq / factor, torch.where(fast, inv_freq, ramped))


def rope_angles(position_ids: Tensor, inv_freq: Tensor) -> Tensor:
    """Angles [s, b, 1, dim], both halves alike (megatron-core's table), from position ids [b, s]."""
    half = position_ids.t().to(inv_freq.dtype)[..., None] * inv_freq
    return torch.cat((half, half), dim=-1)[:, :, None, :]


def rope_reference(x: Tensor, angles: Tensor) -> Tensor:
    """Rotate x [s, b, h, dim] by angles [s, b, 1, dim]."""
    first, second = x.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return x * angles.cos().to(x.dtype) + turned * angles.sin().to(x.dtype)
