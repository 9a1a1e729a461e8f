"""Attention over the paged cache: one launch that attends, cut into parts, and one that adds the parts up.

What to read is decided on the host, by `work.py`: a list of items, each a stretch of one row's keys and the queries
that look at it. Long rows are cut into several items so that all multiprocessors have work; branches that share the
pages of a prefix look at it in one item, so it is read once for all of them. A query that is in one item has its result
at once. Otherwise every item leaves a part, the mean of the values it saw and the log of the sum of their weights, and
a second launch merges each query's parts, in their order, so the result is always the same.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ..device import processors
from .pieces import stay_whole


# `slots` differs with the number of tokens; compiled once for all of them, a new one takes no second while others wait.
@triton.jit(do_not_specialize=["slots"])
def _decode_kernel(query, keys, values, pages, items, item_tokens, item_limits, tails, counts, parts, logs, out,
                   scale, q_token, q_head, slots,
                 HEADS: tl.constexpr, GROUPS: tl.constexpr, SHARERS: tl.constexpr, M: tl.constexpr, DIM: tl.constexpr,
                 LANES: tl.constexpr, PAGE: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """One program per item and key/value head; the query heads of all its tokens are the M rows of its products.

    With PDL it reads the list before it waits: of its step only the last kernel writes it (`decode_step.end_step`), and
    a step begins when the one before is through.
    """
    group, item = tl.program_id(0), tl.program_id(1)
    first_page, start = tl.load(items + 4 * item), tl.load(items + 4 * item + 1)
    end, slot = tl.load(items + 4 * item + 2), tl.load(items + 4 * item + 3)
    per_group: tl.constexpr = HEADS // GROUPS
    m, lane = tl.arange(0, M), tl.arange(0, LANES)
    sharer, head = m // per_group, group * per_group + m % per_group
    known = sharer < SHARERS
    token = tl.load(item_tokens + item * SHARERS + sharer, mask=known, other=-1).to(tl.int64)
    limit = tl.load(item_limits + item * SHARERS + sharer, mask=known, other=0)
    if SHARERS > 1:
        tail = tails + 3 * item * SHARERS + sharer
        shared = tl.load(tail, mask=known, other=0)
        begin = tl.load(tail + SHARERS, mask=known, other=0)
        slot = tl.load(tail + 2 * SHARERS, mask=known, other=0)
        shared = tl.minimum(shared, end)
        size = tl.maximum(tl.minimum(limit, end) - begin, 0).to(tl.uint32)
    in_dim, asked = lane < DIM, token >= 0
    # Padding of the list ends at once: it would keep a place that a program of the next launch could have. It waits for
    # its item alone: the queries come in the same round trip to memory.
    if start < end:
        count = tl.load(counts + token, mask=asked, other=0)
        if PDL:
            gdc_wait()
            gdc_launch_dependents()
        at = query + token[:, None] * q_token + head[:, None] * q_head + lane[None, :]
        q = tl.load(at, mask=asked[:, None] & in_dim[None, :], other=0.0)
        top = tl.full((M,), float("-inf"), tl.float32)
        total = tl.zeros((M,), tl.float32)
        sums = tl.zeros((M, LANES), tl.float32)
        # The page of a block is loaded one block ahead, so that loading its keys need not wait for it.
        ahead = start + tl.arange(0, BLOCK)
        page = tl.load(pages + (first_page + ahead // PAGE), mask=ahead < end, other=0)
        for block in range(start, end, BLOCK):
            key = block + tl.arange(0, BLOCK)
            # What lies after the end may be anything, NaN included, so it is never read.
            inside = key < end
            if SHARERS > 1:
                # Nor what lies between the last key of one row and the first of the next, nor of -1, which keeps a
                # place for a page. A remainder has the sign of what is divided, but for pages of one key it is 0.
                inside &= key % PAGE <= page % PAGE
                if PAGE == 1:
                    inside &= page >= 0
                page = page // PAGE
            place = ((page.to(tl.int64) * PAGE + key % PAGE) * GROUPS + group) * DIM
            page = tl.load(pages + (first_page + (key + BLOCK) // PAGE), mask=key + BLOCK < end, other=0)
            loaded = inside[:, None] & in_dim[None, :]
            k = tl.load(keys + place[:, None] + lane[None, :], mask=loaded, other=0.0)
            scores = tl.dot(q, tl.trans(k), input_precision="ieee") * (scale * 1.4426950408889634)
            if SHARERS > 1:
                own = (key[None, :] - begin[:, None]).to(tl.uint32) < size[:, None]
                visible = (key[None, :] < shared[:, None]) | own
            else:
                visible = inside[None, :] & (key[None, :] < limit[:, None])
            scores = tl.where(visible, scores, float("-inf"))
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
        into = out + (token * HEADS + head)[:, None] * DIM + lane[None, :]
        tl.store(into, mean.to(out.dtype.element_ty), mask=(count == 1)[:, None] & in_dim[None, :])
        several = count > 1
        part = (token * slots + slot) * HEADS + head
        tl.store(parts + part[:, None] * DIM + lane[None, :], mean, mask=several[:, None] & in_dim[None, :])
        tl.store(logs + part, log, mask=several)


@triton.jit(do_not_specialize=["slots"])
def _merge_kernel(parts, logs, counts, out, slots, HEADS: tl.constexpr, DIM: tl.constexpr, LANES: tl.constexpr,
                  TOGETHER: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """One program per token and query head adds up the parts, TOGETHER at once; nothing for a token with one part."""
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    count = tl.load(counts + token)
    number, lane = tl.arange(0, TOGETHER), tl.arange(0, LANES)
    in_dim = lane < DIM
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    if count > 1:
        top, total, sums = float("-inf"), 0.0, tl.zeros((LANES,), tl.float32)
        for first in range(0, count, TOGETHER):
            part = (token * slots + first + number) * HEADS + head
            there = first + number < count
            log = tl.load(logs + part, mask=there, other=float("-inf"))
            mean = tl.load(
                parts + part[:, None] * DIM + lane[None, :], mask=there[:, None] & in_dim[None, :], other=0.0
            )
            new_top = tl.maximum(top, tl.max(log, 0))
            safe = tl.where(new_top == float("-inf"), 0.0, new_top)
            weight, fade = tl.exp2(log - safe), tl.exp2(top - safe)
            sums = sums * fade + tl.sum(weight[:, None] * mean, 0)
            total = total * fade + tl.sum(weight, 0)
            top = new_top
        result = sums / tl.where(total > 0, total, 1.0)
        tl.store(out + (token * HEADS + head) * DIM + lane, result.to(out.dtype.element_ty), mask=in_dim)


def merge_parts(parts: Tensor, logs: Tensor, counts: Tensor, out: Tensor, pdl: bool) -> Tensor:
    """Write to `out` the sums of the parts of each query that has several: `parts` float32 ``[tokens, slots, heads,
    dim]``, their `logs` ``[tokens, slots, heads]``, `counts` of them ``[tokens]``."""
    tokens, slots, heads, dim = parts.shape
    if slots > 1:
        together = min(32, triton.next_power_of_2(slots))
        _merge_kernel[(tokens, heads)](
            parts, logs, counts, out, slots, HEADS=heads, DIM=dim, LANES=max(16, triton.next_power_of_2(dim)),
            TOGETHER=together, PDL=pdl, num_warps=max(1, together // 8), **({"launch_pdl": True} if pdl else {}),
        )  # fmt: skip
    return out


def tile_sizes(m: int, sharers: int, programs: int, whole: bool) -> dict[str, int]:
    """Tile sizes for products of m rows, of which each may be left whole: the fastest on an H200
    (benchmarks/results/decode_tiles_h200.md)."""
    if m >= 64:
        return {"BLOCK": 32, "num_warps": 4, "num_stages": 4}
    if whole:
        return {"BLOCK": 128, "num_warps": 8, "num_stages": 3}
    # Many programs hide each other's waits if they are small enough to be resident together. Tiles are never many.
    stages = 2 if sharers == 1 and programs > 256 else 3
    return {"BLOCK": 64, "num_warps": 4, "num_stages": stages}


def tree_decode_triton(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    pages: Tensor,
    items: Tensor,
    item_tokens: Tensor,
    item_limits: Tensor,
    tails: Tensor,
    counts: Tensor,
    softmax_scale: float,
    *,
    slots: int,
    out: Tensor | None = None,
    pdl: bool = True,
    blocks: dict[str, int] | None = None,
) -> Tensor:
    """Attend from new tokens over a paged cache by a list of work, see `pieces.Work`.

    Args:
        query: ``[tokens, heads, head dim]``, rotary applied; last axis contiguous.
        keys: ``[pages, page_size, kv heads, head dim]``, contiguous.
        values: same shape as `keys`.
        pages: int32, page tables, flat.
        items: int32 ``[items, 4]``.
        item_tokens: int32 ``[items, sharers]``.
        item_limits: int32 ``[items, sharers]``.
        tails: int32 ``[items, 3, sharers]``, or empty with one sharer.
        counts: int32 ``[tokens]``.
        softmax_scale: factor on the scores.
        slots: most parts of a query.
        out: where the results go, contiguous; rows of queries that no item has stay as they are.
        pdl: start while the preceding kernel ends; False where there is no GPU.
        blocks: tile sizes, for benchmarks.

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
    out = query.new_empty(tokens, heads, dim) if out is None else out
    options = {"launch_pdl": True} if pdl else {}
    # So many keys in flight fit into shared memory where each has 256 bytes at most.
    whole = sharers == 1 and lanes * keys.itemsize <= 256 and stay_whole(tokens * groups, processors(keys.device))
    blocks = blocks or tile_sizes(m, sharers, tokens * groups, whole)
    # The heads of an item stand next to each other, so that the padding of the list comes after all of its work.
    _decode_kernel[(groups, len(items))](
        query, keys, values, pages, items, item_tokens, item_limits, tails, counts, parts, logs, out,
        softmax_scale, query.stride(0), query.stride(1), slots, HEADS=heads, GROUPS=groups, SHARERS=sharers, M=m,
        DIM=dim, LANES=lanes, PAGE=page, PDL=pdl, **blocks, **options,
    )  # fmt: skip
    return merge_parts(parts, logs, counts, out, pdl)
