"""The projection to queries, keys and values, rotated and written into the cache, in one launch.

Every program multiplies rows of the weights that belong to one head, as many of its first half as of its second, which
the rotation turns by each other. So it can end with that, and with the write into the cache, and what is projected is
neither written nor read in between.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from megatron_multiverse.kernels.fused_linear.triton_skinny import multiply_rows, prepare_product

MOST_ROWS = 8
"""Rows for which this was measured (1 and 8, bf16): a step of Qwen2.5-1.5B is 2 to 4 % shorter, one of 7B the same."""
MOST_WRITES = 64
"""Slots that a program has in its registers at once; a CUDA graph for 8 rows has room for 40."""


# Compiled once for all numbers of slots: a new one would take a second while others wait.
@triton.jit(do_not_specialize=["writes"])
def _product_kernel(x, x_scale, weight, scale, bias, partial, arrived, rows, depth, x_row, table, keys, values,
                    slots, tokens, query, writes, ROWS: tl.constexpr, BLOCK_OUT: tl.constexpr,
                    BLOCK_K: tl.constexpr, SPLITS: tl.constexpr, BIAS: tl.constexpr, SCALED: tl.constexpr,
                    PREFETCH: tl.constexpr, GROUPS: tl.constexpr, PER_GROUP: tl.constexpr, HALF: tl.constexpr,
                    WRITES: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """Program (i, j): the i-th BLOCK_OUT rows of the weights, the j-th stretch of their sums, see `multiply_rows`."""
    tile = tl.program_id(0)
    outputs: tl.constexpr = BLOCK_OUT // 2
    per_head: tl.constexpr = HALF // outputs
    dim: tl.constexpr = 2 * HALF
    lane, row, number = tl.arange(0, BLOCK_OUT), tl.arange(0, ROWS), tl.arange(0, WRITES)
    head, piece = tile // per_head, tile % per_head
    group, kind = head // (PER_GROUP + 2), head % (PER_GROUP + 2)
    place = piece * outputs + tl.arange(0, outputs)
    weight_row = head * dim + piece * outputs + lane % outputs + lane // outputs * HALF
    # This reads before it waits. What stands right before it, a norm or a sum over ranks, lets it start only after a
    # wait of its own, so the step's table is whole; slots and tokens are from the end of the step before.
    is_turned, there = kind <= PER_GROUP, row < rows
    angle = table + row[None, :] * dim + place[:, None]
    cos = tl.load(angle, mask=there[None, :] & is_turned, other=1.0).to(tl.float32)
    sin = tl.load(angle + HALF, mask=there[None, :] & is_turned, other=0.0).to(tl.float32)
    is_written = (number < writes) & (kind >= PER_GROUP)
    slot = tl.load(slots + number, mask=is_written, other=-1).to(tl.int64)
    token = tl.load(tokens + number, mask=is_written, other=0).to(tl.int32)
    sums, last = multiply_rows(
        x, x_scale, weight, scale, bias, partial, arrived, weight_row, weight_row >= 0, rows, depth,
        GROUPS * (PER_GROUP + 2) * dim, x_row, ROWS, BLOCK_OUT, BLOCK_K, SPLITS, BIAS, SCALED, PREFETCH, PDL,
    )  # fmt: skip
    if last:
        # Rounded as where the projection is written: values are the same bits, what is rotated is within a rounding.
        sums = sums.to(query.dtype.element_ty).to(tl.float32)
        first, second = tl.split(tl.permute(tl.reshape(sums, (2, outputs, ROWS)), (1, 2, 0)))
        # A value is copied, whatever it holds.
        turned_first = tl.where(is_turned, first * cos - second * sin, first)
        turned_second = tl.where(is_turned, second * cos + first * sin, second)
        if kind < PER_GROUP:
            at = query + ((row * GROUPS + group) * PER_GROUP + kind)[None, :] * dim + place[:, None]
            tl.store(at, turned_first.to(query.dtype.element_ty), mask=there[None, :])
            tl.store(at + HALF, turned_second.to(query.dtype.element_ty), mask=there[None, :])
        else:
            of_write = tl.broadcast_to(token[None, :], (outputs, WRITES))
            written_first = tl.gather(turned_first, of_write, 1).to(keys.dtype.element_ty)
            written_second = tl.gather(turned_second, of_write, 1).to(keys.dtype.element_ty)
            into = ((slot * GROUPS + group) * dim)[None, :] + place[:, None]
            if kind == PER_GROUP:
                tl.store(keys + into, written_first, mask=(slot >= 0)[None, :])
                tl.store(keys + into + HALF, written_second, mask=(slot >= 0)[None, :])
            else:
                tl.store(values + into, written_first, mask=(slot >= 0)[None, :])
                tl.store(values + into + HALF, written_second, mask=(slot >= 0)[None, :])


def fits(rows: int, dim: int, writes: int) -> bool:
    """Whether the kernel takes so many tokens, heads of `dim` numbers, and as many slots."""
    return rows <= MOST_ROWS and dim >= 16 and dim & (dim - 1) == 0 and writes <= MOST_WRITES


def linear_write_kv_triton(
    x: Tensor,
    weight: Tensor,
    table: Tensor,
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
    tokens: Tensor,
    *,
    bias: Tensor | None = None,
    pdl: bool = True,
    blocks: dict[str, int] | None = None,
) -> Tensor:
    """The product by `skinny_linear`, then `write_kv_reference` without norms; a slot of -1 writes nothing.

    Args:
        x: ``[n, hidden]`` as `skinny_linear` takes it.
        weight: ``[heads * head dim, hidden]`` in the dtype of `x`; per kv head its queries, its key, its value.
        table: see `write_kv_reference`, as are keys, values, slots and tokens; all contiguous. Slots beyond
            `MOST_WRITES` would not be written: ask `fits` first.
        bias: ``[heads * head dim]`` or None.
        pdl: see `skinny_linear`.
        blocks: see `skinny_linear`.

    Returns:
        The rotated query ``[n, heads, head dim]``.
    """
    dim, groups = table.shape[-1], keys.shape[-2]
    heads = len(weight) // dim
    product = prepare_product(x, weight, bias=bias, scale=None, pdl=pdl, blocks=blocks, most_outputs=dim)
    query = x.new_empty(len(x), heads - 2 * groups, dim)
    _product_kernel[product.grid](
        *product.arguments, table, keys, values, slots, tokens, query, len(slots), GROUPS=groups,
        PER_GROUP=heads // groups - 2, HALF=dim // 2, WRITES=32 if len(slots) <= 32 else MOST_WRITES,
        **product.options,
    )  # fmt: skip
    return query
