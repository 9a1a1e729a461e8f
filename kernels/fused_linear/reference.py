"""A linear layer with what stands after it in a transformer layer, and the norm before it: the plain versions.

Shapes: n tokens, the weights as torch keeps them, ``[out, in]``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

FP8 = torch.float8_e4m3fn


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm of the last dimension of x with a learned scale, computed in float32 or better."""
    if x.dtype == weight.dtype and x.dtype in (torch.float32, torch.float64):
        return F.rms_norm(x, (x.shape[-1],), weight, eps)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    normed = F.rms_norm(wide, (x.shape[-1],), None, eps).to(x.dtype)
    return normed * weight.to(x.dtype)


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A weight [out, in] in FP8 (e4m3, 448 at most) and float32 scales [out], one for each row.

    The scales are powers of two, so that what the numbers stand for is exact in every wider format: a model in FP8 is
    the model whose weights are rounded so, and nothing else of it changes.
    """
    most = weight.abs().amax(1).float().clamp(min=1e-30)
    scale = torch.exp2(torch.ceil(torch.log2(most / torch.finfo(FP8).max)))
    return (weight.float() / scale[:, None]).to(FP8), scale


def dequantize_rows(weight: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """What the numbers of `quantize_rows` stand for; without a scale the weight as it is."""
    return weight if scale is None else weight.to(dtype) * scale[:, None].to(dtype)


def split_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [n, width] as two parts in FP8 [n, 2, width] and a float32 scale [n], a power of two.

    x is scale * (first + second / 16): in bfloat16 exactly what is at least 2^-13 of the greatest number of its row, as
    each part has four of the eight significant bits, and what is smaller to 2^-21 of the greatest.
    """
    most = x.abs().amax(1).float()
    scale = torch.exp2((torch.frexp(most).exponent.float() - 8).clamp(-126, 126))
    scaled = x.float() / scale[:, None]
    first = scaled.to(FP8)
    second = ((scaled - first.float()) * 16).to(FP8)
    return torch.stack((first, second), 1), scale


def linear_swiglu_reference(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Linear, then silu(first half) * second half: x [n, in], weight [2 * ffn, in] -> [n, ffn]."""
    gate, up = F.linear(x, weight, bias).chunk(2, dim=-1)
    return F.silu(gate) * up


def linear_add_reference(x: Tensor, weight: Tensor, residual: Tensor, bias: Tensor | None = None) -> Tensor:
    """Linear into the residual stream: adds x [n, in] weight^T (+ bias) to residual [n, out] in place; returns it."""
    if bias is not None:
        residual.add_(bias)
    return residual.addmm_(x, weight.t())
