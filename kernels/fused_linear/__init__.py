"""The linear layers of decoding, each with the norm, the activation or the residual that stands beside it.

On a GPU a kernel of ours multiplies up to 32 rows in half precision; more rows, and everything on a CPU, take torch's
products.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .reference import linear_add_reference, norm_linear_reference, norm_swiglu_reference, rms_norm

MAX_ROWS = 32
"""With more, cuBLAS is faster (64 rows of Qwen2.5-7B on an H200: 5.97 ms per step instead of 7.1)."""


def norm_linear(x: Tensor, norm_weight: Tensor, eps: float, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Norm, then linear: x [n, in] -> [n, out]."""
    if not _on_gpu(x, weight):
        return norm_linear_reference(x, norm_weight, eps, weight, bias)
    from .triton_rows import norm_rows
    from .triton_skinny import skinny_linear

    normed = norm_rows(x, norm_weight, eps)
    return skinny_linear(normed, weight, bias=bias) if len(x) <= MAX_ROWS else F.linear(normed, weight, bias)


def norm_swiglu(x: Tensor, norm_weight: Tensor, eps: float, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Norm, linear, then silu(first half) * second half: x [n, in], weight [2 * ffn, in] -> [n, ffn]."""
    if not _on_gpu(x, weight):
        return norm_swiglu_reference(x, norm_weight, eps, weight, bias)
    from .triton_rows import norm_rows, swiglu_rows
    from .triton_skinny import skinny_linear

    normed = norm_rows(x, norm_weight, eps)
    if len(x) <= MAX_ROWS:
        return skinny_linear(normed, weight, bias=bias, swiglu=True)
    return swiglu_rows(F.linear(normed, weight, bias))


def linear_add(x: Tensor, weight: Tensor, residual: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """Linear into the residual stream: adds x [n, in] weight^T (+ bias) to residual [n, out] in place and returns it;
    without a residual, the product alone."""
    if _on_gpu(x, weight) and len(x) <= MAX_ROWS:
        from .triton_skinny import skinny_linear

        return skinny_linear(x, weight, residual=residual, bias=bias)
    return linear_add_reference(x, weight, residual, bias)


def _on_gpu(x: Tensor, weight: Tensor) -> bool:
    """The kernels take half precision, with weights as the products read them."""
    return x.is_cuda and x.dtype.itemsize == 2 and x.dtype == weight.dtype and weight.is_contiguous()


__all__ = [
    "linear_add",
    "linear_add_reference",
    "norm_linear",
    "norm_linear_reference",
    "norm_swiglu",
    "norm_swiglu_reference",
    "rms_norm",
]
