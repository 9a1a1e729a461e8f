"""What stands between the products where it is not part of one: RMSNorm, SwiGLU, FP8 parts, one launch each."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .reference import FP8


@triton.jit
def _norm_kernel(x, weight, out, width, x_row, eps, LANES: tl.constexpr, PDL: tl.constexpr):
    """One program per row."""
    row, lane = tl.program_id(0).to(tl.int64), tl.arange(0, LANES)
    inside = lane < width
    scale = tl.load(weight + lane, mask=inside, other=0.0).to(tl.float32)
    if PDL:
        # In this order: the next kernel reads the table of the step before it waits (kv_write/triton_product.py).
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


@triton.jit
def _on_fp8_grid(value):
    """float32 rounded to the nearest number of e4m3 (ties to even), up to its largest: still float32.

    By addition, not by a conversion to FP8 and back: of that ptxas 12.8, which Triton 3.6 brings, makes code that reads
    another register (findings/ptxas_12_8_unpacks_fp8_from_the_wrong_register.sh).
    """
    # e4m3 has steps of 2^(e - 3) from 2^e on, and of 2^-9 below 2^-6. Beside 1.5 * 2^(e + 20), float32 has the same.
    exponent = tl.maximum((value.to(tl.int32, bitcast=True) >> 23) & 255, 121)
    large = (((exponent + 20) << 23) | 0x400000).to(tl.float32, bitcast=True)
    return (value + large) - large


@triton.jit
def _split_kernel(x, parts, scales, width, x_row, LANES: tl.constexpr, PDL: tl.constexpr):
    """One program per row; see `split_rows`."""
    row, lane = tl.program_id(0).to(tl.int64), tl.arange(0, LANES)
    inside = lane < width
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    value = tl.load(x + row * x_row + lane, mask=inside, other=0.0).to(tl.float32)
    # Powers of two by their exponent bits, within what float32 has of them.
    exponent = (tl.max(tl.abs(value), 0).to(tl.int32, bitcast=True) >> 23) - 7
    exponent = tl.minimum(tl.maximum(exponent, 1), 253)
    value *= ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    high = _on_fp8_grid(value)
    low = (value - high) * 16
    tl.store(parts + 2 * row * width + lane, high.to(parts.dtype.element_ty), mask=inside)
    tl.store(parts + (2 * row + 1) * width + lane, low.to(parts.dtype.element_ty), mask=inside)
    tl.store(scales + row, (exponent << 23).to(tl.float32, bitcast=True))


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


def split_rows_triton(x: Tensor, *, pdl: bool = True) -> tuple[Tensor, Tensor]:
    """`split_rows` of x [n, width]."""
    rows, width = x.shape
    parts = x.new_empty((rows, 2, width), dtype=FP8)
    scales = x.new_empty(rows, dtype=torch.float32)
    lanes = triton.next_power_of_2(width)
    options = {"launch_pdl": True} if pdl else {}
    _split_kernel[(rows,)](
        x, parts, scales, width, x.stride(0), LANES=lanes, PDL=pdl, num_warps=min(16, max(1, lanes // 512)), **options
    )
    return parts, scales
