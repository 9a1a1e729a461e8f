"""Products of few rows, bound by reading the weights once, with bias, activation or residual in the same launch.

Every program streams a stretch of the weights of some outputs, in tiles as deep in flight as shared memory allows; the
rows of x stay in the L2 cache. Where there are too few outputs to keep the GPU busy, several programs share them: each
leaves its partial sums, and the last to arrive adds them up, or the launch that follows (`skinny_parts`), in a fixed
order, so the result is always the same.

With programmatic dependent launch the kernel starts while its predecessor ends, and asks for its first weights, which
no predecessor writes, before it waits for x.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .tiles import TILES, ProductShape, choose_tiles
from .triton_rows import split_rows_triton


@triton.jit
def _prefetch(address):
    """Ask for the cache line at each address; int32 [shape of address], of no meaning."""
    return tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [address], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def multiply_stretch(x, x_scale, weight, weight_row, rows, depth, x_row, ROWS: tl.constexpr, BLOCK_OUT: tl.constexpr,
                     BLOCK_K: tl.constexpr, SPLITS: tl.constexpr, SCALED: tl.constexpr, PREFETCH: tl.constexpr,
                     PDL: tl.constexpr):  # fmt: skip
    """What program (i, j) of a kernel adds up: BLOCK_OUT rows of the weights by all rows of x, the j-th of SPLITS
    stretches of the sum.

    Weights in FP8 (SCALED) are multiplied by the tensor cores as they are: what the parts of x give is exact, and the
    tensor cores, which add up FP8 products with few bits, hand over their sums after every tile.

    Args:
        x: [rows, depth], or with SCALED what `split_rows` makes of that, [2 * rows, depth].
        x_scale: float32 [rows], if SCALED.
        weight_row: int [BLOCK_OUT], which rows of the weights.
        x_row: elements from one row of x to the next.
        PREFETCH: bytes of each weight row asked for before the wait.

    Returns:
        float32 [BLOCK_OUT, ROWS]; with SCALED not yet multiplied by the weights' scales.
    """
    parts: tl.constexpr = 2 if SCALED else 1
    row, k = tl.arange(0, ROWS), tl.arange(0, BLOCK_K)
    part = tl.arange(0, parts * ROWS)
    stretch = tl.cdiv(tl.cdiv(depth, BLOCK_K), SPLITS) * BLOCK_K
    begin = tl.program_id(1) * stretch
    end = tl.minimum(begin + stretch, depth)
    # int64: the weights of an output layer may have more than 2^31 elements.
    first = weight + weight_row.to(tl.int64)[:, None] * depth
    if PDL:
        if PREFETCH > 0:
            per_line: tl.constexpr = 1024 // weight.dtype.element_ty.primitive_bitwidth
            lines = first + begin + tl.arange(0, PREFETCH // 128)[None, :] * per_line
            _prefetch(lines.to(tl.int64, bitcast=True))
        gdc_wait()
        gdc_launch_dependents()
    sums = tl.zeros((BLOCK_OUT, parts * ROWS), tl.float32)
    for start in range(begin, end, BLOCK_K):
        place = start + k
        inside = place < end
        w = tl.load(first + place[None, :], mask=inside[None, :], other=0.0, eviction_policy="evict_first")
        there = (part < parts * rows)[None, :] & inside[:, None]
        sums = tl.dot(
            w, tl.load(x + part[None, :] * x_row + place[:, None], mask=there, other=0.0), sums,
            max_num_imprecise_acc=BLOCK_K if SCALED else None,
        )  # fmt: skip
    if SCALED:
        high, low = tl.split(tl.reshape(sums, (BLOCK_OUT, ROWS, 2)))
        sums = (high + low / 16) * tl.load(x_scale + row, mask=row < rows, other=0.0)[None, :]
    return sums


@triton.jit
def multiply_rows(x, x_scale, weight, scale, bias, partial, arrived, weight_row, in_width, rows, depth, weight_rows,
                  x_row, ROWS: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_K: tl.constexpr, SPLITS: tl.constexpr,
                  BIAS: tl.constexpr, SCALED: tl.constexpr, PREFETCH: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """`multiply_stretch`; the last of SPLITS programs to arrive has the sums of all.

    Args:
        scale: float32 [weight_rows], if SCALED.
        bias: [weight_rows], if BIAS.
        partial: float32 [SPLITS, ROWS, weight_rows].
        arrived: int32 [programs along i], zero; left zero.
        weight_row: int [BLOCK_OUT], which rows of the weights; those not `in_width` are 0.
        weight_rows: of all programs.

    Returns:
        float32 [BLOCK_OUT, ROWS], and whether the sums are whole.
    """
    tile, split = tl.program_id(0), tl.program_id(1)
    row = tl.arange(0, ROWS)
    # No kernel of a step writes these, so they come while the one before still runs.
    if SCALED:
        factor = tl.load(scale + weight_row, mask=in_width, other=0.0)[:, None]
    if BIAS:
        shift = tl.load(bias + weight_row, mask=in_width, other=0.0).to(tl.float32)[:, None]
    sums = multiply_stretch(
        x, x_scale, weight, weight_row, rows, depth, x_row, ROWS, BLOCK_OUT, BLOCK_K, SPLITS, SCALED, PREFETCH, PDL
    )  # fmt: skip
    last = True
    if SPLITS > 1:
        plane = ROWS * weight_rows
        mine = partial + row[None, :] * weight_rows + weight_row[:, None]
        both = in_width[:, None] & (row < rows)[None, :]
        tl.store(mine + split * plane, sums, mask=both)
        tl.debug_barrier()  # all threads' stores come before the one that says so
        last = tl.atomic_add(arrived + tile, 1, sem="acq_rel") == SPLITS - 1
        if last:
            sums = tl.zeros((BLOCK_OUT, ROWS), tl.float32)
            for other in range(SPLITS):
                sums += tl.load(mine + other * plane, mask=both, other=0.0, cache_modifier=".cg")
            tl.store(arrived + tile, 0)
    if last:
        if SCALED:
            sums *= factor
        if BIAS:
            sums += shift
    return sums, last


@triton.jit
def _parts_kernel(x, x_scale, weight, scale, bias, partial, arrived, rows, depth, x_row, width, ROWS: tl.constexpr,
                  BLOCK_OUT: tl.constexpr, BLOCK_K: tl.constexpr, SPLITS: tl.constexpr, BIAS: tl.constexpr,
                  SCALED: tl.constexpr, PREFETCH: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """Program (i, j): the i-th BLOCK_OUT rows of the weights, the j-th stretch of their sums, for the next launch.

    Scales, bias and counters are not used: all kernels are launched with the arguments of a `Product`.
    """
    output, row = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT), tl.arange(0, ROWS)
    in_width = output < width
    sums = multiply_stretch(
        x, x_scale, weight, tl.where(in_width, output, 0), rows, depth, x_row, ROWS, BLOCK_OUT, BLOCK_K, SPLITS,
        SCALED, PREFETCH, PDL,
    )  # fmt: skip
    at = partial + (tl.program_id(1) * ROWS + row[None, :]) * width + output[:, None]
    tl.store(at, sums, mask=in_width[:, None] & (row < rows)[None, :])


@triton.jit
def _skinny_kernel(x, x_scale, weight, scale, bias, partial, arrived, rows, depth, x_row, out, width, out_row,
                   ROWS: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_K: tl.constexpr, SPLITS: tl.constexpr,
                   SWIGLU: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr, SCALED: tl.constexpr,
                   PREFETCH: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """Program (i, j): the i-th BLOCK_OUT rows of the weights, the j-th stretch of their sums, see `multiply_rows`.

    With SWIGLU half of these rows belong to the gate and half to what it opens.

    Args:
        rows, depth, width: out is [rows, width].
        out_row: elements from one row to the next.
    """
    tile = tl.program_id(0)
    outputs: tl.constexpr = BLOCK_OUT // 2 if SWIGLU else BLOCK_OUT
    lane, row = tl.arange(0, BLOCK_OUT), tl.arange(0, ROWS)
    output = tile * outputs + lane % outputs
    in_width = output < width
    weight_row = tl.where(in_width, output + lane // outputs * width, 0)
    sums, last = multiply_rows(
        x, x_scale, weight, scale, bias, partial, arrived, weight_row, in_width, rows, depth,
        2 * width if SWIGLU else width, x_row, ROWS, BLOCK_OUT, BLOCK_K, SPLITS, BIAS, SCALED, PREFETCH, PDL,
    )  # fmt: skip
    if last:
        if SWIGLU:
            gate, up = tl.split(tl.permute(tl.reshape(sums, (2, outputs, ROWS)), (1, 2, 0)))
            result = gate / (1 + tl.exp(-gate)) * up
        else:
            result = sums
        column = tile * outputs + tl.arange(0, outputs)
        stored = (column < width)[:, None] & (row < rows)[None, :]
        if RESIDUAL:
            old = tl.load(out + row[None, :] * out_row + column[:, None], mask=stored, other=0.0)
            result += old.to(tl.float32)
        tl.store(out + row[None, :] * out_row + column[:, None], result.to(out.dtype.element_ty), mask=stored)


@functools.cache
def _counters(device: torch.device) -> Tensor:
    """Zeros that the programs of a launch count on; launches of one stream share them."""
    return torch.zeros(1 << 16, dtype=torch.int32, device=device)


class Product(NamedTuple):
    """How a kernel that calls `multiply_rows` or `multiply_stretch` is launched."""

    grid: tuple[int, int]
    arguments: tuple[Tensor | int | float, ...]
    """x, x_scale, weight, scale, bias, partial, arrived, rows, depth, x_row."""
    options: dict[str, int | bool]
    """What is known when it is compiled."""
    partial: Tensor
    """float32 [splits, rows or more, out], where the parts of the sums go; x where there are none."""


def prepare_product(
    x: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None,
    scale: Tensor | None,
    pdl: bool,
    blocks: dict[str, int] | None,
    swiglu: bool = False,
    most_outputs: int | None = None,
    parted: bool = False,
) -> Product:
    """Tiles and scratch memory of a product.

    Args:
        x: [n, in]; weight, bias, scale, pdl, blocks and swiglu as `skinny_linear` takes them.
        most_outputs: rows of the weight that a program may have at most; a power of two.
        parted: another launch adds the parts up, also if there is one alone.
    """
    rows, depth = x.shape
    scaled = scale is not None
    parts, x_scale = split_rows_triton(x, pdl=pdl) if scaled else (x, x)
    lanes = max(8 if scaled else 16, triton.next_power_of_2(rows))
    width = len(weight) // 2 if swiglu else len(weight)
    shape = ProductShape(depth, width, swiglu, parted, lanes, weight.dtype.itemsize)
    blocks = blocks or TILES.get(shape) or choose_tiles(shape)
    if most_outputs is not None:
        blocks = blocks | {"BLOCK_OUT": min(blocks["BLOCK_OUT"], most_outputs)}
    splits = blocks["SPLITS"]
    partial = x.new_empty((splits, lanes, len(weight)), dtype=torch.float32) if splits > 1 or parted else x
    options = {"ROWS": lanes, "BIAS": bias is not None, "SCALED": scaled, "PDL": pdl}
    return Product(
        (triton.cdiv(len(weight), blocks["BLOCK_OUT"]), splits),
        (parts, x_scale, weight, x if scale is None else scale, x if bias is None else bias, partial,
         _counters(x.device), rows, depth, parts.stride(-2)),
        options | blocks | ({"launch_pdl": True} if pdl else {}),
        partial,
    )  # fmt: skip


def skinny_linear(
    x: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    scale: Tensor | None = None,
    swiglu: bool = False,
    pdl: bool = True,
    blocks: dict[str, int] | None = None,
) -> Tensor:
    """x [n, in] weight^T, with what stands after it.

    Args:
        x: [n, in] with n up to MAX_ROWS, float16 or bfloat16, last axis contiguous.
        weight: [out, in], contiguous, in x's dtype or FP8; [2 * out, in] with swiglu, the rows of the gate first.
        bias: one per row of weight, or None.
        residual: [n, out] to be added, overwritten by the result and returned, or None.
        scale: float32, one per row of a weight in FP8.
        swiglu: silu(first half) * second half.
        pdl: start while the preceding kernel ends; False where there is no GPU.
        blocks: tile sizes, for benchmarks.

    Returns:
        [n, out].
    """
    product = prepare_product(x, weight, bias=bias, scale=scale, pdl=pdl, blocks=blocks, swiglu=swiglu)
    width = len(weight) // 2 if swiglu else len(weight)
    out = x.new_empty(len(x), width) if residual is None else residual
    _skinny_kernel[product.grid](
        *product.arguments, out, width, out.stride(0), SWIGLU=swiglu, RESIDUAL=residual is not None, **product.options,
    )  # fmt: skip
    return out


def skinny_parts(
    x: Tensor, weight: Tensor, *, scale: Tensor | None = None, pdl: bool = True, blocks: dict[str, int] | None = None
) -> Tensor:
    """The sums of x [n, in] weight^T in parts, for a next launch that adds them up, such as `add_norm_rows`.

    Args: see `skinny_linear`. With `scale` the parts are not multiplied by it yet.

    Returns:
        float32 [parts, n or more rows, out]; rows from n on hold anything.
    """
    product = prepare_product(x, weight, bias=None, scale=scale, pdl=pdl, blocks=blocks, parted=True)
    partial = product.partial
    _parts_kernel[product.grid](*product.arguments, len(weight), **product.options)
    return partial
