"""Products of weights in FP8 with more rows than `triton_skinny.py` is for, by torch's kernel for scaled FP8."""

from __future__ import annotations

import torch
from torch import Tensor

from .triton_rows import split_rows_triton


def split_linear(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """x [n, in] weight^T -> [n, out] in bfloat16, with the weight in FP8; both parts of `split_rows` are rows of one
    product.

    Args:
        x: [n, in], bfloat16.
        weight: [out, in] in FP8, both multiples of 16, contiguous.
        scale: float32 [out], see `quantize_rows`.
    """
    parts, x_scale = split_rows_triton(x)
    scales = torch.stack((x_scale, x_scale / 16), 1).view(-1, 1)
    # Without fast accumulation, in which tensor cores add FP8 products up with few bits.
    both = torch._scaled_mm(
        parts.flatten(0, 1), weight.t(), scales, scale[None], out_dtype=x.dtype, use_fast_accum=False
    )
    return both[0::2] + both[1::2]
