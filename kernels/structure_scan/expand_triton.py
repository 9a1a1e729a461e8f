"""Launch 3 of the scan: what the borders shift becomes positions, labels and segment ends of all tokens.

And launch 5, the order of the query tiles; launch 4 is the kernel of multiverse_attention that makes tile lists.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .documents_triton import place_of


@triton.jit(do_not_specialize=["num_tokens", "rows_of_16", "num_documents", "chunks", "tiles", "batch"])
def expand_kernel(counts, before, shifts, ends, info, position_ids, r_out, segment_end, r_low, r_high, num_tokens,
                  rows_of_16, num_documents, chunks, tiles, batch, CHUNK: tl.constexpr, CHUNKS: tl.constexpr,
                  DOCS: tl.constexpr, TILE: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr):  # fmt: skip
    """Program (chunk, row). Inputs: see `documents_kernel`; outputs int32 [b, s] and [b, tiles]."""
    chunk, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    token = chunk * CHUNK + tl.arange(0, CHUNK)
    real = token < num_tokens
    rank = tl.load(before + row * (num_tokens + 1) + token, mask=real, other=0).to(tl.int32)
    earlier = tl.zeros((CHUNKS,), tl.int32)
    for c0 in range(0, chunk, CHUNKS):
        other = c0 + tl.arange(0, CHUNKS)
        earlier += tl.load(counts + row * chunks + other, mask=other < chunk, other=0)
    rank += tl.sum(earlier, axis=0)

    info += row * num_documents
    side = batch * num_documents
    rows = tl.arange(0, DOCS)
    starts = tl.load(info + rows, mask=rows < num_documents, other=num_tokens)
    first_doc = tl.sum((starts <= chunk * CHUNK).to(tl.int32), axis=0) - 1
    last_doc = tl.sum((starts < tl.minimum(chunk * CHUNK + CHUNK, num_tokens)).to(tl.int32), axis=0) - 1
    doc = tl.full((CHUNK,), 0, tl.int32) + first_doc
    for d in range(first_doc + 1, last_doc + 1):
        doc += (tl.load(info + d) <= token).to(tl.int32)
    start, end = tl.load(info + doc), tl.load(info + side + doc)
    first, n = tl.load(info + 2 * side + doc), tl.load(info + 3 * side + doc)

    base = row * num_tokens
    capacity = rows_of_16 * 16
    stride = (tl.full((), 0, tl.int64) + batch) * capacity
    behind_tag = real & (n > 0) & (rank > first)
    kept = row * capacity + place_of(first, doc)
    tag = shifts + kept + rank - first - 1
    position = tl.load(tag, mask=behind_tag, other=0)
    r = tl.load(tag + stride, mask=behind_tag, other=0)
    segment = tl.load(tag + 2 * stride, mask=behind_tag, other=0)
    close = tl.load(ends + kept + segment, mask=real & (n > 0), other=0)
    r += token + (num_tokens - end) - start
    tl.store(position_ids + base + token, token - start + position, mask=real)
    tl.store(r_out + base + token, r, mask=real)
    tl.store(segment_end + base + token, tl.where(n > 0, close, end), mask=real)

    PER_CHUNK: tl.constexpr = CHUNK // TILE
    tile = chunk * PER_CHUNK + tl.arange(0, PER_CHUNK)
    low = tl.min(tl.reshape(tl.where(real, r, LAST), (PER_CHUNK, TILE)), axis=1)
    high = tl.max(tl.reshape(tl.where(real, r, FIRST), (PER_CHUNK, TILE)), axis=1)
    tl.store(r_low + row * tiles + tile, low, mask=tile < tiles)
    tl.store(r_high + row * tiles + tile, high, mask=tile < tiles)


@triton.jit(do_not_specialize=["tiles"])
def order_kernel(partial, full, order, tiles, OWN: tl.constexpr, CHUNK: tl.constexpr):
    """Program (group of tiles, row): the place of a tile is the number of tiles with more work.

    partial, full: int32 [b, 1, tiles] key tiles of each query tile; order: int32 [b, tiles]. Among equals the
    earlier tile comes first.
    """
    row = tl.program_id(1).to(tl.int64) * tiles
    own = tl.program_id(0) * OWN + tl.arange(0, OWN)
    inside = own < tiles
    work = tl.load(partial + row + own, mask=inside, other=0) + tl.load(full + row + own, mask=inside, other=0)
    place = tl.zeros((OWN,), tl.int32)
    for t0 in range(0, tiles, CHUNK):
        other = t0 + tl.arange(0, CHUNK)
        there = other < tiles
        theirs = tl.load(partial + row + other, mask=there, other=-1)
        theirs += tl.load(full + row + other, mask=there, other=-1)
        ahead = (theirs[None, :] > work[:, None]) | (
            (theirs[None, :] == work[:, None]) & (other[None, :] < own[:, None])
        )
        place += tl.sum(ahead.to(tl.int32), axis=1)
    tl.store(order + row + place, own, mask=inside)
