"""Attention over the paged cache by programs that have several items each, see `shares.py`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .triton_decode import merge_parts, tile_sizes


@triton.jit
def _item(items, tokens, item, last):
    """Where the page of key 0 would stand, first key, end of the keys and token of an item, if it is below `last`."""
    there = item < last
    base, start = tl.load(items + 4 * item, mask=there, other=0), tl.load(items + 4 * item + 1, mask=there, other=0)
    end, token = tl.load(items + 4 * item + 2, mask=there, other=0), tl.load(tokens + item, mask=there, other=0)
    return base, start, end, token.to(tl.int64)


@triton.jit(do_not_specialize=["slots"])
def _shares_kernel(query, keys, values, pages, items, tokens, counts, shares, parts, logs, out,
                   scale, q_token, q_head, slots,
                   HEADS: tl.constexpr, GROUPS: tl.constexpr, M: tl.constexpr, DIM: tl.constexpr, LANES: tl.constexpr,
                   PAGE: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """One program per share and key/value head; the query heads of a token are the M rows of its products.

    The blocks of all its items are one loop, so that the first keys of an item are on their way while the last ones of
    the item before are looked at. `triton_decode._decode_kernel` says when what is read.
    """
    group = tl.program_id(0)
    item, last = tl.load(shares + tl.program_id(1)), tl.load(shares + tl.program_id(1) + 1)
    m, lane = tl.arange(0, M), tl.arange(0, LANES)
    head = group * (HEADS // GROUPS) + m
    asked = (m < HEADS // GROUPS)[:, None] & (lane < DIM)[None, :]
    if item < last:
        blocks = 0
        for first in range(item, last, 16):
            some = first + tl.arange(0, 16)
            start = tl.load(items + 4 * some + 1, mask=some < last, other=0)
            end = tl.load(items + 4 * some + 2, mask=some < last, other=0)
            blocks += tl.sum((end - start + BLOCK - 1) // BLOCK)
        base, start, end, token = _item(items, tokens, item, last)
        next_base, next_start, next_end, next_token = _item(items, tokens, item + 1, last)
        ahead = start + tl.arange(0, BLOCK)
        page = tl.load(pages + (base + ahead // PAGE), mask=ahead < end, other=0)
        if PDL:
            gdc_wait()
            gdc_launch_dependents()
        from_query = query + head[:, None] * q_head + lane[None, :]
        q = tl.load(from_query + token * q_token, mask=asked, other=0.0)
        top = tl.full((M,), float("-inf"), tl.float32)
        total = tl.zeros((M,), tl.float32)
        sums = tl.zeros((M, LANES), tl.float32)
        for _ in range(blocks):
            key = start + tl.arange(0, BLOCK)
            inside = key < end
            place = ((page.to(tl.int64) * PAGE + key % PAGE) * GROUPS + group) * DIM
            # What comes next: the item's next block, or the next item, whose numbers are here already.
            ends = start + BLOCK >= end
            start = tl.where(ends, next_start, start + BLOCK)
            end = tl.where(ends, next_end, end)
            base = tl.where(ends, next_base, base)
            ahead = start + tl.arange(0, BLOCK)
            page = tl.load(pages + (base + ahead // PAGE), mask=ahead < end, other=0)
            item += ends.to(tl.int32)
            after = next_token
            next_base, next_start, next_end, next_token = _item(items, tokens, item + 1, last)
            loaded = inside[:, None] & (lane < DIM)[None, :]
            k = tl.load(keys + place[:, None] + lane[None, :], mask=loaded, other=0.0)
            scores = tl.dot(q, tl.trans(k), input_precision="ieee") * (scale * 1.4426950408889634)
            scores = tl.where(inside[None, :], scores, float("-inf"))
            # Every block has a key that is seen, so no maximum is without end.
            new_top = tl.maximum(top, tl.max(scores, 1))
            weights, shrink = tl.exp2(scores - new_top[:, None]), tl.exp2(top - new_top)
            v = tl.load(values + place[:, None] + lane[None, :], mask=loaded, other=0.0)
            sums = sums * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
            total = total * shrink + tl.sum(weights, 1)
            top = new_top
            if ends:
                mean = sums / total[:, None]
                if tl.load(counts + token) == 1:
                    into = out + (token * HEADS + head)[:, None] * DIM + lane[None, :]
                    tl.store(into, mean.to(out.dtype.element_ty), mask=asked)
                else:
                    part = (token * slots + tl.load(items + 4 * (item - 1) + 3)) * HEADS + head
                    tl.store(parts + part[:, None] * DIM + lane[None, :], mean, mask=asked)
                    tl.store(logs + part, top + tl.log2(total), mask=m < HEADS // GROUPS)
                token = after
                q = tl.load(from_query + token * q_token, mask=asked, other=0.0)
                top = tl.full((M,), float("-inf"), tl.float32)
                total = tl.zeros((M,), tl.float32)
                sums = tl.zeros((M, LANES), tl.float32)


def attend_shares_triton(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    pages: Tensor,
    items: Tensor,
    tokens: Tensor,
    counts: Tensor,
    shares: Tensor,
    softmax_scale: float,
    *,
    slots: int,
    out: Tensor | None = None,
    pdl: bool = True,
) -> Tensor:
    """See `triton_decode.tree_decode_triton`; each item has one query, which sees all of its keys.

    Args:
        shares: int32 ``[programs + 1]``, where in `items` those of each program begin.
    """
    rows, heads, dim = query.shape
    page, groups = keys.shape[1:3]
    m, lanes = max(16, triton.next_power_of_2(heads // groups)), max(16, triton.next_power_of_2(dim))
    parts = query.new_empty((rows, slots, heads, dim), dtype=torch.float32)
    logs = query.new_empty((rows, slots, heads), dtype=torch.float32)
    out = query.new_empty(rows, heads, dim) if out is None else out
    sizes = tile_sizes(m, 1, programs=1, whole=False)  # with many programs, too, three stages take less time than two
    _shares_kernel[(groups, len(shares) - 1)](
        query, keys, values, pages, items, tokens, counts, shares, parts, logs, out, softmax_scale, query.stride(0),
        query.stride(1), slots, HEADS=heads, GROUPS=groups, M=m, DIM=dim, LANES=lanes, PAGE=page, PDL=pdl,
        **sizes, **({"launch_pdl": True} if pdl else {}),
    )  # fmt: skip
    return merge_parts(parts, logs, counts, out, pdl)
