"""Split, norm, rotation and the write into the cache in one launch."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def _rotated_heads(source, norm, cos, sin, eps, head, lane, in_heads, half: tl.constexpr, NORM: tl.constexpr):
    """Heads `head` of `source`, normed and rotated: their first and second halves, [heads, lanes] float32."""
    mask = in_heads[:, None] & (lane < half)[None, :]
    at = source + head[:, None] * (2 * half) + lane[None, :]
    first = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(at + half, mask=mask, other=0.0).to(tl.float32)
    if NORM:
        squares = tl.sum(first * first + second * second, 1) / (2 * half)
        scale = tl.rsqrt(squares + eps)[:, None]
        first *= scale * tl.load(norm + lane, mask=lane < half, other=0.0).to(tl.float32)[None, :]
        second *= scale * tl.load(norm + half + lane, mask=lane < half, other=0.0).to(tl.float32)[None, :]
    return first * cos - second * sin, second * cos + first * sin


@triton.jit
def _write_kernel(mixed, table, keys, values, slots, tokens, query, query_norm, key_norm, n, writes, eps,
                  GROUPS: tl.constexpr, PER_GROUP: tl.constexpr, HALF: tl.constexpr, LANES: tl.constexpr,
                  HEADS: tl.constexpr, NORM: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """Program (i, g) rotates the queries of token i in group g, and does write i of group g's key and value."""
    number, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    width: tl.constexpr = (PER_GROUP + 2) * 2 * HALF
    lane, head = tl.arange(0, LANES), tl.arange(0, HEADS)
    half = lane < HALF
    # All but `mixed` is there before the kernel right before this one starts.
    there = number < n
    cos = tl.load(table + number * 2 * HALF + lane, mask=half & there, other=0.0).to(tl.float32)[None, :]
    sin = tl.load(table + number * 2 * HALF + HALF + lane, mask=half & there, other=0.0).to(tl.float32)[None, :]
    slot = tl.load(slots + number, mask=number < writes, other=-1).to(tl.int64)
    token = tl.load(tokens + number, mask=number < writes, other=0).to(tl.int64)
    key_cos = tl.load(table + token * 2 * HALF + lane, mask=half, other=0.0).to(tl.float32)[None, :]
    key_sin = tl.load(table + token * 2 * HALF + HALF + lane, mask=half, other=0.0).to(tl.float32)[None, :]
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    if there:
        source = mixed + (number * GROUPS + group) * width
        in_heads = head < PER_GROUP
        first, second = _rotated_heads(source, query_norm, cos, sin, eps, head, lane, in_heads, HALF, NORM)
        mask = in_heads[:, None] & half[None, :]
        at = query + ((number * GROUPS + group) * PER_GROUP + head[:, None]) * (2 * HALF) + lane[None, :]
        tl.store(at, first.to(query.dtype.element_ty), mask=mask)
        tl.store(at + HALF, second.to(query.dtype.element_ty), mask=mask)
    if slot >= 0:
        key = mixed + (token * GROUPS + group) * width + PER_GROUP * 2 * HALF
        one = head < 1
        first, second = _rotated_heads(key, key_norm, key_cos, key_sin, eps, head, lane, one, HALF, NORM)
        mask = one[:, None] & half[None, :]
        into = (slot * GROUPS + group) * 2 * HALF + head[:, None] * 0 + lane[None, :]
        tl.store(keys + into, first.to(keys.dtype.element_ty), mask=mask)
        tl.store(keys + into + HALF, second.to(keys.dtype.element_ty), mask=mask)
        # The value is copied bit by bit, whatever it holds.
        at = key + 2 * HALF + head[:, None] * 0 + lane[None, :]
        tl.store(values + into, tl.load(at, mask=mask), mask=mask)
        tl.store(values + into + HALF, tl.load(at + HALF, mask=mask), mask=mask)


def write_kv_triton(
    mixed: Tensor,
    table: Tensor,
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
    tokens: Tensor,
    *,
    query_norm: Tensor | None = None,
    key_norm: Tensor | None = None,
    eps: float = 0.0,
    pdl: bool = True,
) -> Tensor:
    """See `write_kv_reference`; all tensors contiguous, `tokens` given, and a slot of -1 writes nothing.

    pdl: start while the preceding kernel ends; False where there is no GPU.
    """
    n, groups, width = mixed.shape
    dim = table.shape[-1]
    per_group = width // dim - 2
    query = mixed.new_empty(n, groups * per_group, dim)
    norm = query_norm is not None and key_norm is not None
    options = {"launch_pdl": True} if pdl else {}
    _write_kernel[(max(n, len(slots)), groups)](
        mixed, table, keys, values, slots, tokens, query, query_norm if norm else mixed, key_norm if norm else mixed,
        n, len(slots), eps, GROUPS=groups, PER_GROUP=per_group, HALF=dim // 2,
        LANES=triton.next_power_of_2(dim // 2), HEADS=triton.next_power_of_2(per_group), NORM=norm, PDL=pdl,
        num_warps=2, **options,
    )  # fmt: skip
    return query
