"""Launch 3 of the scan: the shifts of the borders become positions and labels of all tokens, and the smallest and
largest label of each tile. Launch 4 is the kernel of multiverse_attention that makes tile lists from these."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import cuda

from .triton_documents import document_starts, place_of


@triton.jit(do_not_specialize=["num_tokens", "rows_of_16", "num_documents", "chunks", "tiles"])
def expand_kernel(documents, counts, before, shifts, info, position_ids, r_out, r_low, r_high, num_tokens, rows_of_16,
                  num_documents, chunks, tiles, CHUNK: tl.constexpr, CHUNKS: tl.constexpr, DOCS: tl.constexpr,
                  TILE: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr, CHAINED: tl.constexpr):  # fmt: skip
    """Program (chunk, row). Inputs: see `documents_kernel`; outputs int32 [b, s] and [b, tiles]."""
    tl.static_assert((CHUNK % TILE == 0) & (CHUNK < 65536), "a chunk is whole tiles, and counts tags in 16 bits")
    chunk, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    token = chunk * CHUNK + tl.arange(0, CHUNK)
    real = token < num_tokens
    # rank: how many borders of the row stand before the token, those before the chunk and those in it. Launch 1 has
    # written the counts, but the L1 cache may hold what stood there before; .cg reads past it.
    rank = tl.load(before + row * (num_tokens + 1) + token, mask=real, other=0, cache_modifier=".cg") >> 16
    other = tl.arange(0, CHUNKS)
    count = tl.load(counts + row * chunks + other, mask=other < chunk, other=0, cache_modifier=".cg")
    rank += tl.sum(count >> 16, axis=0)
    # Find the document of each token. A chunk touches few documents, so a loop over those is enough; the first one that
    # reaches into the chunk is the starting value.
    starts = document_starts(documents + row * num_documents * 2, num_documents, num_tokens, DOCS)
    number = tl.arange(0, DOCS)
    first_doc = tl.sum((starts <= chunk * CHUNK).to(tl.int32), axis=0) - 1
    last_doc = tl.sum((starts < tl.minimum(chunk * CHUNK + CHUNK, num_tokens)).to(tl.int32), axis=0) - 1
    doc = tl.full((CHUNK,), 0, tl.int32) + first_doc
    start = tl.full((CHUNK,), 0, tl.int32) + tl.sum(tl.where(number == first_doc, starts, 0), axis=0)
    end = tl.full((CHUNK,), 0, tl.int32) + num_tokens
    for d in range(first_doc + 1, last_doc + 2):
        next_start = tl.min(tl.where(number == d, starts, num_tokens), axis=0)
        begun = next_start <= token
        doc += begun.to(tl.int32)
        start, end = tl.where(begun, next_start, start), tl.where(begun, end, tl.minimum(end, next_start))
    # So far only launch 1 was needed, which has ended. What follows needs launch 2, which may still run.
    if CHAINED:
        cuda.gdc_wait()
    first_border = tl.load(info + row * 2 * num_documents + doc, mask=real, other=0)
    num_borders = tl.load(info + (row * 2 + 1) * num_documents + doc, mask=real, other=0)

    base = row * num_tokens
    capacity = rows_of_16 * 16
    # A document keeps the shifts before each of its borders and after the last one, so a token takes the entry numbered
    # by the borders before it in the document. A malformed document says that it has 0 borders, and keeps a 0 there.
    segment = place_of(first_border, doc) + tl.minimum(tl.maximum(rank - first_border, 0), num_borders)
    shifts += row * 2 * capacity
    position = tl.load(shifts + segment, mask=real, other=0)
    r = tl.load(shifts + capacity + segment, mask=real, other=0)
    # The row itself is a block whose paths are the documents: S = 0, E = num_tokens, [s, e) = [start, end).
    r += token + (num_tokens - end) - start
    tl.store(position_ids + base + token, token - start + position, mask=real)
    tl.store(r_out + base + token, r, mask=real)

    if CHAINED:
        cuda.gdc_launch_dependents()
    PER_CHUNK: tl.constexpr = CHUNK // TILE
    tile = chunk * PER_CHUNK + tl.arange(0, PER_CHUNK)
    low = tl.min(tl.reshape(tl.where(real, r, LAST), (PER_CHUNK, TILE)), axis=1)
    high = tl.max(tl.reshape(tl.where(real, r, FIRST), (PER_CHUNK, TILE)), axis=1)
    tl.store(r_low + row * tiles + tile, low, mask=tile < tiles)
    tl.store(r_high + row * tiles + tile, high, mask=tile < tiles)
