"""Products of few rows, bound by reading the weights once: norm before, bias, activation or residual after.

Decoding multiplies 1 to 64 rows by weights of up to a gigabyte. Every program owns some outputs and streams their
weights once, in tiles as deep in flight as shared memory allows; the rows of x stay in the L2 cache. A norm costs
nothing extra: its learned scale is applied to x as it is read, and the root mean square of a row, which the same loop
adds up, divides the finished sums.

With programmatic dependent launch the kernel starts while its predecessor ends, and asks for its first weights, which
no predecessor writes, before it waits for x.
"""

from __future__ import annotations

import functools

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def _prefetch(address):
    """Ask for the cache line at each address; int32 [shape of address], of no meaning."""
    return tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [address], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def _skinny_kernel(x, norm, weight, bias, residual, out, rows, depth, width, x_row, residual_row, out_row, eps,
                   ROWS: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_K: tl.constexpr, NORM: tl.constexpr,
                   SWIGLU: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr, PREFETCH: tl.constexpr,
                   PDL: tl.constexpr):  # fmt: skip
    """One program per BLOCK_OUT outputs of all rows.

    Args:
        rows, depth, width: x is [rows, depth], out [rows, width].
        x_row, residual_row, out_row: elements from one row to the next.
        ROWS: rows rounded up to what a tensor core takes.
        PREFETCH: bytes of each weight row asked for before the wait.
    """
    output = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    row, k = tl.arange(0, ROWS), tl.arange(0, BLOCK_K)
    in_width, in_rows = output < width, row < rows
    # int64: the weights of an output layer may have more than 2^31 elements.
    first = weight + tl.where(in_width, output, 0).to(tl.int64)[:, None] * depth
    if PDL:
        if PREFETCH > 0:
            lines = first + tl.arange(0, PREFETCH // 128)[None, :] * 64
            _prefetch(lines.to(tl.int64, bitcast=True))
            if SWIGLU:
                _prefetch((lines + width.to(tl.int64) * depth).to(tl.int64, bitcast=True))
        gdc_wait()
        gdc_launch_dependents()
    sums = tl.zeros((BLOCK_OUT, ROWS), tl.float32)
    sums_up = tl.zeros((BLOCK_OUT, ROWS), tl.float32)
    squares = tl.zeros((ROWS,), tl.float32)
    for start in range(0, depth, BLOCK_K):
        place = start + k
        inside = place < depth
        w = tl.load(first + place[None, :], mask=inside[None, :], other=0.0, eviction_policy="evict_first")
        part = tl.load(x + row[None, :] * x_row + place[:, None], mask=in_rows[None, :] & inside[:, None], other=0.0)
        if NORM:
            wide = part.to(tl.float32)
            squares += tl.sum(wide * wide, 0)
            part = (wide * tl.load(norm + place, mask=inside, other=0.0).to(tl.float32)[:, None]).to(part.dtype)
        sums = tl.dot(w, part, sums)
        if SWIGLU:
            up = tl.load(
                first + width.to(tl.int64) * depth + place[None, :], mask=inside[None, :], other=0.0,
                eviction_policy="evict_first",
            )  # fmt: skip
            sums_up = tl.dot(up, part, sums_up)
    if NORM:
        scale = tl.rsqrt(squares / depth + eps)[None, :]
        sums *= scale
        sums_up *= scale
    if BIAS:
        sums += tl.load(bias + output, mask=in_width, other=0.0).to(tl.float32)[:, None]
    if SWIGLU:
        if BIAS:
            sums_up += tl.load(bias + width + output, mask=in_width, other=0.0).to(tl.float32)[:, None]
        sums = sums / (1 + tl.exp(-sums)) * sums_up
    both = in_width[:, None] & in_rows[None, :]
    if RESIDUAL:
        old = tl.load(residual + row[None, :] * residual_row + output[:, None], mask=both, other=0.0)
        sums += old.to(tl.float32)
    tl.store(out + row[None, :] * out_row + output[:, None], sums.to(out.dtype.element_ty), mask=both)


@functools.cache
def _blocks(rows: int, depth: int, width: int, swiglu: bool) -> dict[str, int]:
    """Tile sizes of a shape, found by `benchmarks/kernels/skinny_linear.py` on an H100."""
    rows = max(16, triton.next_power_of_2(rows))
    wide = width * (2 if swiglu else 1) >= 16384
    block_out = (32 if wide else 16) if rows == 16 else 64 if wide else 32
    return {
        "ROWS": rows,
        "BLOCK_OUT": block_out // 2 if swiglu and rows == 16 else block_out,
        "BLOCK_K": 256 if rows == 16 else 128,
        "num_warps": 4,
        "num_stages": 4 if rows == 16 else 3,
        "PREFETCH": 512,
    }


def skinny_linear(
    x: Tensor,
    weight: Tensor,
    *,
    norm_weight: Tensor | None = None,
    eps: float = 0.0,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    swiglu: bool = False,
    pdl: bool = True,
    blocks: dict[str, int] | None = None,
) -> Tensor:
    """x [n, in] weight^T, with what stands before and after it.

    Args:
        x: [n, in], float16 or bfloat16, last axis contiguous.
        weight: [out, in], contiguous, in x's dtype; [2 * out, in] with swiglu, the rows of the gate first.
        norm_weight: [in], scale of an RMSNorm of x, or None for no norm.
        eps: of the norm.
        bias: one per row of weight, or None.
        residual: [n, out] to be added, or None.
        swiglu: silu(first half) * second half.
        pdl: start while the preceding kernel ends; False where there is no GPU.
        blocks: tile sizes, for benchmarks.

    Returns:
        [n, out].
    """
    rows, depth = x.shape
    width = weight.shape[0] // 2 if swiglu else weight.shape[0]
    out = x.new_empty(rows, width)
    blocks = blocks or _blocks(rows, depth, width, swiglu)
    options = {"launch_pdl": True} if pdl else {}
    _skinny_kernel[(triton.cdiv(width, blocks["BLOCK_OUT"]),)](
        x, x if norm_weight is None else norm_weight, weight, x if bias is None else bias,
        x if residual is None else residual, out, rows, depth, width, x.stride(0),
        0 if residual is None else residual.stride(0), width, eps, NORM=norm_weight is not None, SWIGLU=swiglu,
        BIAS=bias is not None, RESIDUAL=residual is not None, PDL=pdl, **blocks, **options,
    )  # fmt: skip
    return out
