"""The linear layers of decoding, each with the norm, the activation or the residual that stands beside it.

On a GPU a kernel of ours multiplies few rows in half precision; more rows, and everything on a CPU, take torch's
products.
"""

from __future__ import annotations

from torch import Tensor

from .reference import linear_add_reference, norm_linear_reference, norm_swiglu_reference, rms_norm

MAX_ROWS = 64
"""More rows are not bound by reading the weights, and cuBLAS is the better choice."""


def norm_linear(x: Tensor, norm_weight: Tensor, eps: float, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Norm, then linear: x [n, in] -> [n, out]."""
    if _has_kernel(x, weight):
        from .triton_skinny import skinny_linear

        return skinny_linear(x, weight, norm_weight=norm_weight, eps=eps, bias=bias)
    return norm_linear_reference(x, norm_weight, eps, weight, bias)


def norm_swiglu(x: Tensor, norm_weight: Tensor, eps: float, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Norm, linear, then silu(first half) * second half: x [n, in], weight [2 * ffn, in] -> [n, ffn]."""
    if _has_kernel(x, weight):
        from .triton_skinny import skinny_linear

        return skinny_linear(x, weight, norm_weight=norm_weight, eps=eps, bias=bias, swiglu=True)
    return norm_swiglu_reference(x, norm_weight, eps, weight, bias)


def linear_add(x: Tensor, weight: Tensor, residual: Tensor, bias: Tensor | None = None) -> Tensor:
    """Linear, then the residual stream: residual [n, out] + x [n, in] weight^T (+ bias)."""
    if _has_kernel(x, weight):
        from .triton_skinny import skinny_linear

        return skinny_linear(x, weight, residual=residual, bias=bias)
    return linear_add_reference(x, weight, residual, bias)


def _has_kernel(x: Tensor, weight: Tensor) -> bool:
    return x.is_cuda and len(x) <= MAX_ROWS and x.dtype.itemsize == 2 and x.dtype == weight.dtype


__all__ = [
    "linear_add",
    "linear_add_reference",
    "norm_linear",
    "norm_linear_reference",
    "norm_swiglu",
    "norm_swiglu_reference",
    "rms_norm",
]
