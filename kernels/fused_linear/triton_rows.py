"""What stands between the products where it is not part of one: RMSNorm and SwiGLU, one launch each."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def _norm_kernel(x, weight, out, width, x_row, eps, LANES: tl.constexpr, PDL: tl.constexpr):
    """One program per row."""
    row, lane = tl.program_id(0).to(tl.int64), tl.arange(0, LANES)
    inside = lane < width
    scale = tl.load(weight + lane, mask=inside, other=0.0).to(tl.float32)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    value = tl.load(x + row * x_row + lane, mask=inside, other=0.0).to(tl.float32)
    value *= tl.rsqrt(tl.sum(value * value, 0) / width + eps) * scale
    tl.store(out + row * width + lane, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _swiglu_kernel(x, out, width, x_row, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """Program (i, j): the j-th BLOCK of row i."""
    row, lane = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = lane < width
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    gate = tl.load(x + row * x_row + lane, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(x + row * x_row + width + lane, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * width + lane, (gate / (1 + tl.exp(-gate)) * up).to(out.dtype.element_ty), mask=inside)


def norm_rows(x: Tensor, weight: Tensor, eps: float, *, pdl: bool = True) -> Tensor:
    """RMSNorm of x [n, width] with scale [width], computed in float32."""
    rows, width = x.shape
    out = x.new_empty(rows, width)
    lanes = triton.next_power_of_2(width)
    options = {"launch_pdl": True} if pdl else {}
    _norm_kernel[(rows,)](
        x, weight, out, width, x.stride(0), eps, LANES=lanes, PDL=pdl, num_warps=8 if lanes > 1024 else 4, **options
    )
    return out


def swiglu_rows(x: Tensor, *, pdl: bool = True) -> Tensor:
    """silu(first half) * second half of x [n, 2 * width]."""
    rows, width = x.shape[0], x.shape[1] // 2
    out = x.new_empty(rows, width)
    options = {"launch_pdl": True} if pdl else {}
    _swiglu_kernel[(rows, triton.cdiv(width, 1024))](
        x, out, width, x.stride(0), BLOCK=1024, PDL=pdl, num_warps=4, **options
    )
    return out
