"""A linear layer with what stands after it in a transformer layer, and the norm before it: the plain versions.

Shapes: n tokens, the weights as torch keeps them, ``[out, in]``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm of the last dimension of x with a learned scale, computed in float32 or better."""
    if x.dtype == weight.dtype and x.dtype in (torch.float32, torch.float64):
        return F.rms_norm(x, (x.shape[-1],), weight, eps)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    normed = F.rms_norm(wide, (x.shape[-1],), None, eps).to(x.dtype)
    return normed * weight.to(x.dtype)


def linear_swiglu_reference(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Linear, then silu(first half) * second half: x [n, in], weight [2 * ffn, in] -> [n, ffn]."""
    gate, up = F.linear(x, weight, bias).chunk(2, dim=-1)
    return F.silu(gate) * up


def linear_add_reference(x: Tensor, weight: Tensor, residual: Tensor, bias: Tensor | None = None) -> Tensor:
    """Linear into the residual stream: adds x [n, in] weight^T (+ bias) to residual [n, out] in place; returns it."""
    if bias is not None:
        residual.add_(bias)
    return residual.addmm_(x, weight.t())
