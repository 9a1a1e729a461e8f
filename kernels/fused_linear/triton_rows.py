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
def _add_norm_kernel(partial, scale, bias, residual, weight, out, width, residual_row, eps, SPLITS: tl.constexpr,
                     ROWS: tl.constexpr, LANES: tl.constexpr, SCALED: tl.constexpr, BIAS: tl.constexpr,
                     PDL: tl.constexpr):  # fmt: skip
    """One program per row: adds the parts of a product up, in their order, adds them to the residual, and norms it."""
    row, lane = tl.program_id(0).to(tl.int64), tl.arange(0, LANES)
    inside = lane < width
    gain = tl.load(weight + lane, mask=inside, other=0.0).to(tl.float32)
    if SCALED:
        factor = tl.load(scale + lane, mask=inside, other=0.0)
    if BIAS:
        shift = tl.load(bias + lane, mask=inside, other=0.0).to(tl.float32)
    if PDL:
        # In this order, as in the norm.
        gdc_wait()
        gdc_launch_dependents()
    kept = tl.load(residual + row * residual_row + lane, mask=inside, other=0.0).to(tl.float32)
    sums = tl.zeros((LANES,), tl.float32)
    for part in tl.static_range(SPLITS):
        sums += tl.load(partial + (part * ROWS + row) * width + lane, mask=inside, other=0.0)
    if SCALED:
        sums *= factor
    if BIAS:
        sums += shift
    # Normed as it is kept, rounded.
    total = (sums + kept).to(residual.dtype.element_ty)
    tl.store(residual + row * residual_row + lane, total, mask=inside)
    value = total.to(tl.float32)
    value *= tl.rsqrt(tl.sum(value * value, 0) / width + eps) * gain
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


def add_norm_rows(
    partial: Tensor,
    residual: Tensor,
    norm_weight: Tensor,
    eps: float,
    *,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    pdl: bool = True,
) -> Tensor:
    """Add the parts of a product to the residual stream, in place, and norm it.

    Args:
        partial: float32 [parts, at least n, width], contiguous, what `skinny_parts` leaves.
        residual: [n, width].
        norm_weight: [width], of the RMSNorm.
        eps: of the RMSNorm.
        bias: [width] or None.
        scale: float32 [width], of a weight in FP8, or None.
        pdl: start while the preceding kernel ends; False where there is no GPU.

    Returns:
        The normed rows [n, width].
    """
    rows, width = residual.shape
    out = residual.new_empty(rows, width)
    lanes = triton.next_power_of_2(width)
    options = {"launch_pdl": True} if pdl else {}
    _add_norm_kernel[(rows,)](
        partial, partial if scale is None else scale, partial if bias is None else bias, residual, norm_weight, out,
        width, residual.stride(0), eps, SPLITS=partial.shape[0], ROWS=partial.shape[1], LANES=lanes,
        SCALED=scale is not None, BIAS=bias is not None, PDL=pdl, num_warps=min(32, max(4, lanes // 128)), **options,
    )  # fmt: skip
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
