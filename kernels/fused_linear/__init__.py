"""The linear layers of decoding, each with the activation or the residual that stands beside it, and their norm.

On a GPU a kernel of ours multiplies up to 32 rows in half precision; more rows, and everything on a CPU, take torch's
products. For weights in FP8 those are torch's scaled ones up to `MAX_SPLIT_ROWS` rows; beyond, the weights are widened.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .reference import (
    FP8,
    dequantize_rows,
    linear_add_reference,
    linear_swiglu_reference,
    quantize_rows,
    rms_norm,
    split_rows,
)

MAX_ROWS = 32
"""With more, cuBLAS is faster (64 rows of Qwen2.5-7B on an H200: 5.97 ms per step instead of 7.1)."""

MAX_SPLIT_ROWS = 2048
"""The most that were measured: both parts of so many rows, multiplied by a weight in FP8, still take less time than the
rows by a weight that is widened first (an H200, benchmarks/kernels/results/fp8_products_h200.md). What widening saves
grows with the rows, what it costs does not, so it wins at some point beyond."""


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm of x [n, width] with a learned scale [width], computed in float32 or better."""
    if not _on_gpu(x, weight):
        return rms_norm(x, weight, eps)
    from .triton_rows import norm_rows

    return norm_rows(x, weight, eps)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, scale: Tensor | None = None) -> Tensor:
    """x [n, in] weight^T (+ bias) -> [n, out]; `scale` [out] of a weight in FP8, see `quantize_rows`."""
    if not few_rows(x, weight, scale):
        return _many_rows(x, weight, bias, scale)
    from .triton_skinny import skinny_linear

    return skinny_linear(x, weight, bias=bias, scale=scale)


def linear_swiglu(x: Tensor, weight: Tensor, bias: Tensor | None = None, scale: Tensor | None = None) -> Tensor:
    """Linear, then silu(first half) * second half: x [n, in], weight [2 * ffn, in] -> [n, ffn]."""
    if few_rows(x, weight, scale):
        from .triton_skinny import skinny_linear

        return skinny_linear(x, weight, bias=bias, scale=scale, swiglu=True)
    if not (x.is_cuda and x.dtype.itemsize == 2):
        return linear_swiglu_reference(x, dequantize_rows(weight, scale, x.dtype), bias)
    from .triton_rows import swiglu_rows

    return swiglu_rows(_many_rows(x, weight, bias, scale))


def linear_add(
    x: Tensor, weight: Tensor, residual: Tensor, bias: Tensor | None = None, scale: Tensor | None = None
) -> Tensor:
    """Linear into the residual stream: adds x [n, in] weight^T (+ bias) to residual [n, out] in place; returns it."""
    if few_rows(x, weight, scale):
        from .triton_skinny import skinny_linear

        return skinny_linear(x, weight, residual=residual, bias=bias, scale=scale)
    if _some_rows(x, weight, scale):
        return residual.add_(_many_rows(x, weight, bias, scale))
    return linear_add_reference(x, dequantize_rows(weight, scale, x.dtype), residual, bias)


def linear_add_norm(
    x: Tensor,
    weight: Tensor,
    residual: Tensor,
    norm_weight: Tensor,
    eps: float,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
) -> Tensor:
    """`linear_add` into the residual stream, in place, and what `norm` makes of that, [n, out].

    A kernel adds the sums up in the order of its tiles, so the stream is that of `linear_add` but for rounding.
    """
    if few_rows(x, weight, scale) and residual.dtype == norm_weight.dtype == x.dtype:
        from .triton_rows import add_norm_rows
        from .triton_skinny import skinny_parts

        return add_norm_rows(skinny_parts(x, weight, scale=scale), residual, norm_weight, eps, bias=bias, scale=scale)
    return norm(linear_add(x, weight, residual, bias, scale), norm_weight, eps)


def _many_rows(x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None) -> Tensor:
    """`linear` by torch's products."""
    if scale is None or not _some_rows(x, weight, scale):
        return F.linear(x, dequantize_rows(weight, scale, x.dtype), bias)
    from .scaled import split_linear

    out = split_linear(x, weight, scale)
    return out if bias is None else out.add_(bias)


def few_rows(x: Tensor, weight: Tensor, scale: Tensor | None) -> bool:
    """Whether x [n, in] is multiplied by the kernel for few rows, rather than by torch; `scale` as in `linear`."""
    if scale is not None:
        return x.is_cuda and x.dtype == torch.bfloat16 and len(x) <= MAX_ROWS
    return _on_gpu(x, weight) and len(x) <= MAX_ROWS


def _some_rows(x: Tensor, weight: Tensor, scale: Tensor | None) -> bool:
    """Whether torch's kernel for FP8 multiplies, if that for few rows does not. It takes multiples of 16."""
    if scale is None or not x.is_cuda or x.dtype != torch.bfloat16 or weight.shape[0] % 16 or weight.shape[1] % 16:
        return False
    return len(x) <= MAX_SPLIT_ROWS


def _on_gpu(x: Tensor, weight: Tensor) -> bool:
    """The kernels take half precision, with weights as the products read them."""
    return x.is_cuda and x.dtype.itemsize == 2 and x.dtype == weight.dtype and weight.is_contiguous()


__all__ = [
    "FP8",
    "dequantize_rows",
    "few_rows",
    "linear",
    "linear_add",
    "linear_add_norm",
    "linear_add_reference",
    "linear_swiglu",
    "linear_swiglu_reference",
    "norm",
    "quantize_rows",
    "rms_norm",
    "split_rows",
]
