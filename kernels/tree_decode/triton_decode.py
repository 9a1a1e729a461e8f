"""Attention over the paged cache in one launch, cut into parts that add themselves up.

What to read is decided on the host, by `work.py`: a list of items, each a stretch of one row's keys and the queries
that look at it. Long rows are cut into several items so that all multiprocessors have work; branches that share the
pages of a prefix look at it in one item, so it is read once for all of them. A query that is in one item has its result
at once. Otherwise every item leaves a part, the mean of the values it saw and the log of the sum of their weights, and
the program that finishes a query's last part merges them, in the order of the parts, so the result is always the same.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def _decode_kernel(query, keys, values, pages, items, item_tokens, item_limits, counts, arrived, parts, logs, out,
                   scale, q_token, q_head,
                 HEADS: tl.constexpr, GROUPS: tl.constexpr, SHARERS: tl.constexpr, M: tl.constexpr, DIM: tl.constexpr,
                 LANES: tl.constexpr, PAGE: tl.constexpr, BLOCK: tl.constexpr, SLOTS: tl.constexpr,
                 PDL: tl.constexpr):  # fmt: skip
    """One program per item and key/value head; the query heads of all its tokens are the M rows of its products."""
    item, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    first_page, start = tl.load(items + 4 * item), tl.load(items + 4 * item + 1)
    end, slot = tl.load(items + 4 * item + 2), tl.load(items + 4 * item + 3)
    if start < end:
        per_group: tl.constexpr = HEADS // GROUPS
        m, lane = tl.arange(0, M), tl.arange(0, LANES)
        sharer, head = m // per_group, group * per_group + m % per_group
        token = tl.load(item_tokens + item * SHARERS + sharer, mask=sharer < SHARERS, other=-1).to(tl.int64)
        limit = tl.load(item_limits + item * SHARERS + sharer, mask=sharer < SHARERS, other=0)
        in_dim, asked = lane < DIM, token >= 0
        at = query + token[:, None] * q_token + head[:, None] * q_head + lane[None, :]
        q = tl.load(at, mask=asked[:, None] & in_dim[None, :], other=0.0)
        top = tl.full((M,), float("-inf"), tl.float32)
        total = tl.zeros((M,), tl.float32)
        sums = tl.zeros((M, LANES), tl.float32)
        for block in range(start, end, BLOCK):
            key = block + tl.arange(0, BLOCK)
            # What lies after the end may be anything, NaN included, so it is never read.
            inside = key < end
            page = tl.load(pages + first_page + key // PAGE, mask=inside, other=0).to(tl.int64)
            place = ((page * PAGE + key % PAGE) * GROUPS + group) * DIM
            loaded = inside[:, None] & in_dim[None, :]
            k = tl.load(keys + place[:, None] + lane[None, :], mask=loaded, other=0.0)
            scores = tl.dot(q, tl.trans(k), input_precision="ieee") * (scale * 1.4426950408889634)
            scores = tl.where(inside[None, :] & (key[None, :] < limit[:, None]), scores, float("-inf"))
            new_top = tl.maximum(top, tl.max(scores, 1))
            safe = tl.where(new_top == float("-inf"), 0.0, new_top)
            weights = tl.exp2(scores - safe[:, None])
            shrink = tl.exp2(top - safe)
            v = tl.load(values + place[:, None] + lane[None, :], mask=loaded, other=0.0)
            sums = sums * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
            total = total * shrink + tl.sum(weights, 1)
            top = new_top
        seen = total > 0
        mean = sums / tl.where(seen, total, 1.0)[:, None]
        log = tl.where(seen, top + tl.log2(tl.where(seen, total, 1.0)), float("-inf"))
        count = tl.load(counts + token, mask=asked, other=0)
        into = out + (token * HEADS + head)[:, None] * DIM + lane[None, :]
        tl.store(into, mean.to(out.dtype.element_ty), mask=(count == 1)[:, None] & in_dim[None, :])
        most = tl.max(count, 0)
        if most > 1:
            several = count > 1
            part = (token * SLOTS + slot) * HEADS + head
            tl.store(parts + part[:, None] * DIM + lane[None, :], mean, mask=several[:, None] & in_dim[None, :])
            tl.store(logs + part, log, mask=several)
            tl.debug_barrier()  # all threads' stores come before the one that says so
            seat = tl.arange(0, SHARERS)
            seat_token = tl.load(item_tokens + item * SHARERS + seat).to(tl.int64)
            seat_count = tl.load(counts + seat_token, mask=seat_token >= 0, other=0)
            counter = arrived + seat_token * GROUPS + group
            before = tl.atomic_add(counter, 1, mask=seat_count > 1, sem="acq_rel")
            seat_done = (seat_count > 1) & (before == seat_count - 1)
            tl.store(counter, 0, mask=seat_done)
            here = sharer[:, None] == seat[None, :]
            done = tl.sum((here & seat_done[None, :]).to(tl.int32), 1) > 0
            if tl.max(done.to(tl.int32), 0) > 0:
                best = tl.full((M,), float("-inf"), tl.float32)
                whole = tl.zeros((M,), tl.float32)
                merged = tl.zeros((M, LANES), tl.float32)
                for number in range(0, most):
                    there = done & (number < count)
                    its = (token * SLOTS + number) * HEADS + head
                    its_log = tl.load(logs + its, mask=there, other=float("-inf"), cache_modifier=".cg")
                    its_mean = tl.load(
                        parts + its[:, None] * DIM + lane[None, :], mask=there[:, None] & in_dim[None, :], other=0.0,
                        cache_modifier=".cg",
                    )  # fmt: skip
                    new_best = tl.maximum(best, its_log)
                    finite = tl.where(new_best == float("-inf"), 0.0, new_best)
                    weight, fade = tl.exp2(its_log - finite), tl.exp2(best - finite)
                    merged = merged * fade[:, None] + weight[:, None] * its_mean
                    whole = whole * fade + weight
                    best = new_best
                result = merged / tl.where(whole > 0, whole, 1.0)[:, None]
                tl.store(into, result.to(out.dtype.element_ty), mask=done[:, None] & in_dim[None, :])


@functools.cache
def _counters(device: torch.device, count: int) -> Tensor:
    """Zeros on which the programs of a launch count a query's parts; launches of one stream share them."""
    return torch.zeros(count, dtype=torch.int32, device=device)


def tree_decode_triton(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    pages: Tensor,
    items: Tensor,
    item_tokens: Tensor,
    item_limits: Tensor,
    counts: Tensor,
    softmax_scale: float,
    *,
    slots: int,
    pdl: bool = True,
) -> Tensor:
    """Attend from new tokens over a paged cache by a list of work, see `work.Work`.

    Args:
        query: ``[tokens, heads, head dim]``, rotary applied; last axis contiguous.
        keys: ``[pages, page_size, kv heads, head dim]``, contiguous.
        values: same shape as `keys`.
        pages: int32, page tables, flat.
        items: int32 ``[items, 4]``.
        item_tokens: int32 ``[items, sharers]``.
        item_limits: int32 ``[items, sharers]``.
        counts: int32 ``[tokens]``.
        softmax_scale: factor on the scores.
        slots: most parts of a query.
        pdl: start while the preceding kernel ends; False where there is no GPU.

    Returns:
        ``[tokens, heads, head dim]`` in the dtype of `query`.
    """
    tokens, heads, dim = query.shape
    page, groups = keys.shape[1:3]
    sharers = item_tokens.shape[1]
    m = max(16, triton.next_power_of_2(sharers * (heads // groups)))
    lanes = max(16, triton.next_power_of_2(dim))
    parts = query.new_empty((tokens, slots, heads, dim), dtype=torch.float32)
    logs = query.new_empty((tokens, slots, heads), dtype=torch.float32)
    out = query.new_empty(tokens, heads, dim)
    # Few sizes, so that they are made before a CUDA graph is captured, and stay.
    counters = _counters(query.device, triton.next_power_of_2(max(tokens * groups, 4096)))
    options = {"launch_pdl": True} if pdl else {}
    _decode_kernel[(len(items), groups)](
        query, keys, values, pages, items, item_tokens, item_limits, counts, counters, parts, logs, out,
        softmax_scale, query.stride(0), query.stride(1), HEADS=heads, GROUPS=groups, SHARERS=sharers, M=m, DIM=dim,
        LANES=lanes, PAGE=page, BLOCK=64, SLOTS=slots, PDL=pdl, num_warps=4 if m <= 64 else 8, num_stages=3, **options,
    )  # fmt: skip
    return out
