"""Launch 2 of the scan: one program per document checks its tags and computes what every border shifts.

Lanes exchange values through global memory with a barrier of the program between store and load. Every loop over
the tags goes in blocks with carries, so a document may hold any number of them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .grammar_triton import check_levels
from .tags_triton import BORDER, CONCLUSION, END_GOAL, END_PATH, OUTLINE, PATH, index_of, kind_of, level_of

NONE = tl.constexpr(-(1 << 30))
"""Smaller than any length: no path so far."""


@triton.jit
def _add3(a1, b1, c1, a2, b2, c2):
    return a1 + a2, b1 + b2, c1 + c2


@triton.jit
def _add5(a1, b1, c1, d1, e1, a2, b2, c2, d2, e2):
    return a1 + a2, b1 + b2, c1 + c2, d1 + d2, e1 + e2


@triton.jit
def _then(flags1, a1, b1, c1, path1, goal1, missing1, flags2, a2, b2, c2, path2, goal2, missing2):
    """One run of tags behind another, as functions of (p, m): position in the path, longest path of the block.

    p becomes a (flag 1) or p + a; m becomes max(c, p + b, and without flag 2 m).
    """
    starts = (flags1 & 1) != 0
    drops = (flags2 & 2) != 0
    from_p = tl.where(starts, NONE, a1 + b2)
    constant = tl.maximum(c2, tl.where(starts, a1 + b2, NONE))
    return (
        flags1 | flags2,
        tl.where((flags2 & 1) != 0, a2, a1 + a2),
        tl.where(drops, from_p, tl.maximum(b1, from_p)),
        tl.where(drops, constant, tl.maximum(c1, constant)),
        tl.maximum(path1, path2),
        tl.maximum(goal1, goal2),
        missing1 + missing2,
    )


@triton.jit
def place_of(first, doc):
    """Where in its row the tags of a document are kept, their first one being the row's tag number `first`.

    A multiple of 4 (rows of scratch begin at multiples of 16); behind the tags of all documents before.
    """
    return ((first + 3) // 4 + doc) * 4


@triton.jit
def document_borders(documents, doc, num_documents, num_tokens, DOCS: tl.constexpr):
    """Start, response start and end of a document: 0 <= start <= response <= end <= s whatever the input says."""
    rows = tl.arange(0, DOCS)
    starts = tl.load(documents + rows * 2, mask=(rows < num_documents) & (rows > 0), other=0)
    starts = tl.minimum(tl.maximum(starts, 0), num_tokens)
    start = tl.max(tl.where(rows <= doc, starts, 0), axis=0)
    end = tl.max(tl.where(rows <= doc + 1, starts, 0), axis=0)
    end = tl.where(doc + 1 < num_documents, end, num_tokens)
    response = tl.minimum(tl.maximum(tl.load(documents + doc * 2 + 1), start), end)
    return start, response, end


@triton.jit
def _collect(tags, counts, before, raw, doc, response, end, CHUNK: tl.constexpr, CHUNKS: tl.constexpr,
             SLOTS: tl.constexpr):  # fmt: skip
    """Copy the tags of tokens [response, end) to raw, from `place_of` on; returns rank of the first and number."""
    low, high = response // CHUNK, end // CHUNK
    earlier = tl.zeros((CHUNKS,), tl.int32)
    for c0 in range(0, low, CHUNKS):
        chunk = c0 + tl.arange(0, CHUNKS)
        earlier += tl.load(counts + chunk, mask=chunk < low, other=0)
    carry = tl.sum(earlier, axis=0)
    first = carry + tl.load(before + response)
    raw += place_of(first, doc) - first
    for c0 in range(low, tl.where(response < end, high + 1, low), CHUNKS):
        chunk = c0 + tl.arange(0, CHUNKS)
        count = tl.load(counts + chunk, mask=chunk <= high, other=0)
        rank0 = carry + tl.cumsum(count, axis=0) - count
        for s0 in range(0, tl.max(count, axis=0), SLOTS):
            slot = s0 + tl.arange(0, SLOTS)
            there = slot[None, :] < count[:, None]
            word = tl.load(tags + chunk.to(tl.int64)[:, None] * CHUNK + slot[None, :], mask=there, other=0)
            mine = there & (index_of(word) >= response) & (index_of(word) < end)
            tl.store(raw + rank0[:, None] + slot[None, :], word, mask=mine)
        carry += tl.sum(tl.where(chunk < high, count, 0), axis=0)
    return first, tl.where(response < end, carry + tl.load(before + end) - first, 0)


@triton.jit
def _fields(words, stride):
    """steps, own, next_own, length, longest: the arrays behind words in scratch."""
    return words + stride, words + 2 * stride, words + 3 * stride, words + 4 * stride, words + 5 * stride


@triton.jit
def _lengths(words, stride, n, level, unequal, BLOCK: tl.constexpr):
    """The blocks of one level: lengths of their paths, in tokens and in positions. Deeper levels came before.

    own: at /Path the tokens of the path, at /Goal those of all paths.
    next_own: at /Goal and /Path the tokens of the path behind it, at Conclusion those of all paths.
    length: at /Path the positions of the path; at Conclusion the longest path minus the tokens of all paths, which
    is what the block adds to the length of what is around it. longest: at Conclusion.
    Returns unequal [BLOCK], 1 where a block has not as many paths as outlines.
    """
    steps, own, next_own, length, longest = _fields(words, stride)
    lane = tl.arange(0, BLOCK)
    p0, m0, path0, goal0, missing0 = 0, 0, -1, -1, 0
    for t0 in range(0, n, BLOCK):
        j = t0 + lane
        word = tl.load(words + j, mask=j < n, other=BORDER)
        plain = tl.load(steps + j, mask=j < n, other=0)
        kind = tl.where(level_of(word) == level, kind_of(word), BORDER)
        added = (level_of(word) == level + 1) & (kind_of(word) == CONCLUSION) & (j < n)
        step = plain + tl.load(length + j, mask=added, other=0)
        flags = tl.where((kind == PATH) | (kind == CONCLUSION), 1, tl.where(kind == END_GOAL, 2, 0))
        flags, a, b, c, path, goal, missing = tl.associative_scan(
            (
                flags,
                step,
                tl.where(kind == END_PATH, step, NONE),
                tl.where(kind == END_GOAL, 0, NONE),
                tl.where(kind == PATH, j - 1, -1),
                tl.where(kind == END_GOAL, j, -1),
                (kind == OUTLINE).to(tl.int32) - (kind == PATH).to(tl.int32),
            ),
            0,
            _then,
        )
        m = tl.maximum(c, tl.where((flags & 2) != 0, NONE, m0))
        m = tl.maximum(m, p0 + b)
        p = tl.where((flags & 1) != 0, a, p0 + a)
        path, goal, missing = tl.maximum(path, path0), tl.maximum(goal, goal0), missing + missing0
        ends_path, ends_block = kind == END_PATH, kind == CONCLUSION
        path_start = tl.load(words + path, mask=ends_path & (path >= 0), other=0)
        tokens = index_of(word) - index_of(path_start)
        tl.store(own + j, tokens, mask=ends_path)
        tl.store(length + j, p, mask=ends_path)
        goal_word = tl.load(words + goal, mask=ends_block & (goal >= 0), other=0)
        region = index_of(word) - plain - index_of(goal_word)
        tl.store(next_own + j, region, mask=ends_block)
        tl.store(longest + j, m, mask=ends_block)
        tl.store(length + j, m - region, mask=ends_block)
        # One scattered store for two, next_own[path] and own[goal]: each costs a trip through shared memory.
        back = tl.where(ends_path, path.to(tl.int64), goal - stride)  # own lies one stride before next_own
        known = (ends_path & (path >= 0)) | (ends_block & (goal >= 0))
        tl.store(next_own + back, tl.where(ends_path, tokens, region), mask=known)
        unequal |= (ends_block & (missing != 0)).to(tl.int32)
        if t0 + BLOCK < n:
            is_last = lane == BLOCK - 1
            p0, m0, path0, goal0, missing0 = tl.reduce(
                (
                    tl.where(is_last, p, 0),
                    tl.where(is_last, m, 0),
                    tl.where(is_last, path, 0),
                    tl.where(is_last, goal, 0),
                    tl.where(is_last, missing, 0),
                ),
                0,
                _add5,
            )
    return unequal


@triton.jit
def _shifts(words, stride, shifts, ends, n, end, BLOCK: tl.constexpr):
    """Sum up what the borders shift.

    shifts [3, ...]: behind each tag position - index and r - index, both beside the document's own, and the number
    of borders up to it. ends: index behind the k-th border, then the end of the document.
    """
    _, own, next_own, length, longest = _fields(words, stride)
    lane = tl.arange(0, BLOCK)
    position0, r0, count0 = 0, 0, 0
    for t0 in range(0, n, BLOCK):
        j = t0 + lane
        word = tl.load(words + j, mask=j < n, other=BORDER)
        forks, joins = kind_of(word) == END_GOAL, kind_of(word) == END_PATH
        border = forks | joins
        last_path = joins & (kind_of(tl.load(words + j + 1, mask=j + 1 < n, other=BORDER)) == CONCLUSION)
        mine = tl.load(own + j, mask=border, other=0)
        follows = tl.load(next_own + j, mask=border & (last_path == 0), other=0)
        region = tl.load(next_own + j + 1, mask=last_path, other=0)
        positions = tl.load(length + j, mask=joins, other=0)
        resume = tl.load(longest + j + 1, mask=last_path, other=0)
        d_position = resume - positions
        d_r = tl.where(forks, mine - follows, tl.where(last_path, region - mine, -follows - mine))
        d_r = tl.where(border, d_r, 0)
        position, r, count = tl.associative_scan((d_position, d_r, border.to(tl.int32)), 0, _add3)
        position, r, count = position0 + position, r0 + r, count0 + count
        tl.store(shifts + j, position, mask=j < n)
        tl.store(shifts + stride + j, r, mask=j < n)
        tl.store(shifts + 2 * stride + j, count, mask=j < n)
        slot = tl.where(border, count - 1, count)
        tl.store(ends + slot, tl.where(border, index_of(word) + 1, end), mask=border | (j == n - 1))
        if t0 + BLOCK < n:
            is_last = lane == BLOCK - 1
            position0, r0, count0 = tl.reduce(
                (tl.where(is_last, position, 0), tl.where(is_last, r, 0), tl.where(is_last, count, 0)), 0, _add3
            )


@triton.jit(do_not_specialize=["num_documents", "num_tokens", "rows_of_16", "chunks", "batch"])
def documents_kernel(documents, tags, counts, before, scratch, shifts, ends, info, malformed, num_documents,
                     num_tokens, rows_of_16, chunks, batch, MAX_DEPTH: tl.constexpr, CHUNK: tl.constexpr,
                     CHUNKS: tl.constexpr, SLOTS: tl.constexpr, DOCS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Program (document, row).

    Args:
        documents: int32 [b, D, 2]; tags, counts, before: see `tags_kernel`.
        scratch: int32 [7, b, capacity] raw tags, words and steps (see `check_levels`), own, next_own, length and
            longest (see `_lengths`); capacity = 16 * rows_of_16 >= s + 4 D. A document begins at `place_of`.
        shifts, ends: int32 [3, b, capacity] and [b, capacity], see `_shifts`.
        info: int32 [4, b, D] start, end, rank of the first tag, number of tags (0 if causal).
        malformed: uint8 [b, D].
    """
    doc, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    start, response, end = document_borders(documents + row * num_documents * 2, doc, num_documents, num_tokens, DOCS)
    capacity = rows_of_16 * 16
    stride = (tl.full((), 0, tl.int64) + batch) * capacity
    raw = scratch + row * capacity
    first, n = _collect(tags + row * chunks * CHUNK, counts + row * chunks, before + row * (num_tokens + 1), raw, doc,
                        response, end, CHUNK, CHUNKS, SLOTS)  # fmt: skip
    kept = row * capacity + place_of(first, doc)
    words = scratch + kept + stride
    tl.debug_barrier()
    depth = check_levels(scratch + kept, words, words + stride, n, MAX_DEPTH, BLOCK)
    tl.debug_barrier()
    unequal = tl.zeros((BLOCK,), tl.int32)
    for up in range(0, tl.where(depth > MAX_DEPTH, 0, depth)):
        unequal = _lengths(words, stride, n, depth - up, unequal, BLOCK)
        tl.debug_barrier()
    broken = (depth > MAX_DEPTH) | (tl.max(unequal, axis=0) != 0)
    n = tl.where(broken, 0, n)
    _shifts(words, stride, shifts + kept, ends + kept, n, end, BLOCK)
    place = info + row * num_documents + doc
    side = batch * num_documents
    tl.store(place, start)
    tl.store(place + side, end)
    tl.store(place + 2 * side, first)
    tl.store(place + 3 * side, n)
    tl.store(malformed + row * num_documents + doc, broken.to(tl.uint8))
