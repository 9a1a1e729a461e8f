"""Rotary embedding (Su et al., 2104.09864), half-rotation form, position ids given per token: the plain versions.

`rope_reference` rotates by angles, as megatron-core does. The layers rotate by a table of cosines and sines, made once
for all of them (`rope_table`); `rotate_by_table` and `rotate_qkv_by_table` are what the kernels are compared with, and
what runs without a GPU.
"""

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
    """Rotate x [s, b, ..., dim] by a `rope_table` [b, s, dim], in the wider of both dtypes; plain torch."""
    by_token = table.transpose(0, 1)
    cos, sin = by_token.view(*by_token.shape[:2], *[1] * (x.ndim - 3), -1).chunk(2, dim=-1)
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
    dim = table.shape[2]
    heads = mixed.unflatten(-1, (-1, dim))
    rotated = rotate_by_table(heads[..., :-1, :], table)  # the queries of each group and its key at once
    return rotated[..., :-1, :].flatten(2, 3), rotated[..., -1, :], heads[..., -1, :]


def check_qkv(mixed: Tensor, table: Tensor) -> None:
    """Raise ValueError unless mixed [s, b, g, (h / g + 2) * dim] and table [b, s, dim] fit together."""
    dim = table.shape[-1]
    fits = mixed.ndim == 4 and table.shape == (*mixed.shape[1::-1], dim)
    if not fits or dim % 2 or mixed.shape[3] % dim or mixed.shape[3] < 3 * dim:
        raise ValueError(
            "mixed [s, b, g, (h / g + 2) * dim] and table [b, s, dim] do not fit: "
            f"{tuple(mixed.shape)}, {tuple(table.shape)}"
        )
