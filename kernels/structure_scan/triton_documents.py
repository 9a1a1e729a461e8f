"""Launch 2 of the scan: one program per document checks its tags and computes what every border shifts.

Tags are read in blocks with carries, so a document may hold any number of them. Borders are then measured level by
level, the deepest first (`triton_borders.py`).
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import cuda

from .triton_borders import LEVELS, list_borders, measure, on_level, ones, sum_up
from .triton_grammar import fits, steps, unpack
from .triton_tags import GOAL, NONE, is_border, kind_of


@triton.jit
def place_of(first, doc):
    """Where in its row the borders of a document are kept, their first one being the row's border number `first`.

    A multiple of 4 (rows of scratch begin at multiples of 16); behind those of all documents before, with one more
    place for each.
    """
    return ((first + 3) // 4 + doc) * 4


@triton.jit
def document_starts(documents, num_documents, num_tokens, DOCS: tl.constexpr):
    """int32 [DOCS]: where each document starts, whatever the input says: within [0, s] and not before the one in front
    of it; the first one at 0, and s behind the last.

    Read while the launch before still runs, so past the L1 cache: it may hold what stood there for an earlier launch.
    """
    doc = tl.arange(0, DOCS)
    given = tl.load(documents + doc * 2, mask=(doc < num_documents) & (doc > 0), other=0, cache_modifier=".cg")
    starts = tl.where(doc < num_documents, tl.minimum(tl.maximum(given, 0), num_tokens), num_tokens)
    return tl.associative_scan(starts, 0, _larger)


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b)


@triton.jit
def _larger2(a1, b1, a2, b2):
    return tl.maximum(a1, a2), tl.maximum(b1, b2)


@triton.jit
def _add3(a1, b1, c1, a2, b2, c2):
    return a1 + a2, b1 + b2, c1 + c2


@triton.jit
def _add_and_latest(sum1, latest1, sum2, latest2):
    return sum1 + sum2, tl.maximum(latest1, latest2)


@triton.jit
def _most_and_sum(most1, sum1, most2, sum2):
    return tl.maximum(most1, most2), sum1 + sum2


@triton.jit
def _pick(tags, counts, begins, marks, inside, CHUNKS: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    """A block of the row's tags, and the tag in front of each (that of the first is not looked up).

    Every chunk leaves a mark at the lane where its tags begin: where tags would have to begin for this chunk's to be in
    place. Marks grow from chunk to chunk, so the last one in front of a lane is the largest.

    Args:
        counts, begins: [CHUNKS] tags of each chunk, and the lane of the first one.
        marks: int32 [BLOCK] of memory.
        inside: the lanes that have a tag.
    """
    lane, chunk = tl.arange(0, BLOCK), tl.arange(0, CHUNKS)
    tl.store(marks + lane, 0)
    tl.debug_barrier()
    here = (counts > 0) & (begins < BLOCK) & (begins + counts > 0)
    tl.store(marks + tl.maximum(begins, 0), chunk * CHUNK - begins, mask=here)
    tl.debug_barrier()
    mark, mark_before = tl.load(marks + lane), tl.load(marks + lane - 1, mask=lane > 0, other=0)
    start, start_before = tl.associative_scan((mark, mark_before), 0, _larger2)
    word = tl.load(tags + start + lane, mask=inside, other=NONE)
    return word, tl.load(tags + start_before + lane - 1, mask=inside & (lane > 0), other=NONE)


@triton.jit
def _read(tags, counts, begins, n, lists, counted, shifts, marks, stride, MAX_DEPTH: tl.constexpr,
          CHUNKS: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Read the tags of a document and list the borders of each level.

    Returns the deepest level, above MAX_DEPTH if a rule is broken, and sums of `ones` over the last BLOCK tags;
    `counted` has those before.
    """
    tl.static_assert(BLOCK < 1024, "fields of ones hold less than 1024")
    lane = tl.arange(0, BLOCK)
    deepest, level0, think0, rank0, goal0, last0 = 0, 0, 0, 0, 0, NONE
    all_shallow, all_deep = 0, tl.full((), 0, tl.int64)
    for t0 in range(0, n, BLOCK):
        j = t0 + lane
        inside = j < n
        word, previous = _pick(tags, counts, begins - t0, marks, inside, CHUNKS, CHUNK, BLOCK)
        previous = tl.where(lane == 0, last0, previous)
        kind, before = kind_of(word), kind_of(previous)
        border = is_border(kind)
        sums, goal = tl.associative_scan((steps(kind, before), tl.where(kind == GOAL, j, 0)), 0, _add_and_latest)
        level, rank, think = unpack(sums)
        level, rank, think, goal = level0 + level, rank0 + rank, (think0 + think) & 0xFF, tl.maximum(goal0, goal)
        right = fits(kind, before, level, think, j == n - 1, MAX_DEPTH)
        slot = (level - 1) & (LEVELS - 1)
        known = (level > 0) & (level <= LEVELS) & inside
        one, one_deep = ones(border & known, slot)
        reached = tl.where(inside, tl.where(right, level, MAX_DEPTH + 1), 0)
        reached, all_shallow = tl.reduce((reached, one), 0, _most_and_sum)
        deepest = tl.maximum(deepest, reached)
        shallow, deep, all_deep = tl.cumsum(one, axis=0), one_deep * 0, tl.full((), 0, tl.int64)
        if reached > 3:
            deep, all_deep = tl.cumsum(one_deep, axis=0), tl.sum(one_deep, axis=0)
        # between <Goal> and </Goal> stand outlines alone, two tags each
        list_borders(word, kind, border, known, slot, rank, (j - goal - 1) // 2, shallow, deep, t0 > 0, lists, counted,
                     shifts, stride)  # fmt: skip
        if t0 + BLOCK < n:
            level8 = tl.arange(0, LEVELS)
            seen = tl.load(counted + level8, mask=t0 > 0, other=0)
            at_end = lane == BLOCK - 1
            sums0, goal0, last0 = tl.reduce(
                (tl.where(at_end, sums, 0), tl.where(at_end, goal, 0), tl.where(at_end, word, 0)), 0, _add3
            )
            up, more, thought = unpack(sums0)
            level0, rank0, think0 = level0 + up, rank0 + more, think0 + thought
            tl.debug_barrier()
            tl.store(counted + level8, seen + on_level(all_shallow, all_deep, level8))
            tl.debug_barrier()
    return deepest, all_shallow, all_deep


@triton.jit(do_not_specialize=["num_documents", "num_tokens", "rows_of_16", "chunks"])
def documents_kernel(documents, tags, counts, before, marks, lists, counted, shifts, info, malformed,
                     num_documents, num_tokens, rows_of_16, chunks, MAX_DEPTH: tl.constexpr, CHUNK: tl.constexpr,
                     CHUNKS: tl.constexpr, DOCS: tl.constexpr, BLOCK: tl.constexpr, BORDERS: tl.constexpr,
                     CHAINED: tl.constexpr):  # fmt: skip
    """Program (document, row).

    Args:
        documents: int32 [b, D, 2], DOCS >= D; tags, counts, before: see `tags_kernel`, CHUNKS >= chunks.
        marks: int32 [b, D, BLOCK + 1], see `_pick`. An odd distance, so that no access is vectorised: all tensors over
            tags then have one layout in registers, and none has to be converted through shared memory.
        lists: int32 [b, 4, 8, capacity], capacity = 16 * rows_of_16 >= s + 4 D: for each level its borders in order,
            a document's from `place_of` on:
            word: index << 1, + 1 for a /Path.
            rank: number of the border among all of the document.
            extra: at /Path positions minus tokens of the blocks in the path, at /Goal the outlines of the block.
            around: at the last /Path of a block the number, on the level above, of the border that ends the path around
                the block.
        counted: int32 [b, D, 8] borders of each level among the tags of the blocks so far.
        shifts: int32 [b, 2, capacity] before each border, and behind the last: position - index and r - index, both
            beside the document's own.
        info: int32 [b, 2, D] number in its row of the first border, number of borders (0 if causal).
        malformed: uint8 [b, D].
        BLOCK, BORDERS: tags and borders that are taken at a time.
        CHAINED: launched while the launch before still runs.
    """
    tl.static_assert(MAX_DEPTH <= LEVELS, "there is one list of borders per level")
    doc, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    documents += row * num_documents * 2
    starts, number = document_starts(documents, num_documents, num_tokens, DOCS), tl.arange(0, DOCS)
    start = tl.sum(tl.where(number == doc, starts, 0), axis=0)
    end = tl.min(tl.where(number == doc + 1, starts, num_tokens), axis=0)
    response = tl.load(documents + doc * 2 + 1, cache_modifier=".cg")
    response = tl.minimum(tl.maximum(response, start), end)
    if CHAINED:
        cuda.gdc_wait()
        cuda.gdc_launch_dependents()  # behind the wait: what starts now may read what launch 1 wrote
    chunk = tl.arange(0, CHUNKS)
    both = tl.load(counts + row * chunks + chunk, mask=chunk < chunks, other=0)
    before += row * (num_tokens + 1)
    at_response, at_end = tl.load(before + response), tl.load(before + end)
    first_chunk, last_chunk = response // CHUNK, end // CHUNK
    count = tl.where(chunk >= first_chunk, both & 0xFFFF, 0)
    begins = tl.cumsum(count, axis=0) - count - (at_response & 0xFFFF)
    n, first_border, num_borders = tl.reduce(
        (
            tl.where(chunk < last_chunk, count, 0),
            tl.where(chunk < first_chunk, both >> 16, 0),
            tl.where((chunk >= first_chunk) & (chunk < last_chunk), both >> 16, 0),
        ),
        0,
        _add3,
    )
    n += (at_end & 0xFFFF) - (at_response & 0xFFFF)
    first_border += at_response >> 16
    num_borders += (at_end >> 16) - (at_response >> 16)

    capacity = rows_of_16 * 16
    place = place_of(first_border, doc)
    lists += row * 4 * LEVELS * capacity + place
    shifts += row * 2 * capacity + place
    counted += (row * num_documents + doc) * LEVELS
    marks += (row * num_documents + doc) * (BLOCK + 1)
    depth, shallow, deep = _read(tags + row * chunks * CHUNK, count, begins, n, lists, counted, shifts, marks,
                                 capacity, MAX_DEPTH, CHUNKS, CHUNK, BLOCK)  # fmt: skip
    tl.debug_barrier()
    unequal = tl.zeros((BORDERS,), tl.int32)
    for up in range(0, tl.where(depth > MAX_DEPTH, 0, depth)):
        slot = depth - up - 1
        size = on_level(shallow, deep, slot) + tl.load(counted + slot, mask=n > BLOCK, other=0)
        unequal = measure(lists, size, shifts, capacity, slot, unequal, BORDERS)
        tl.debug_barrier()
    broken = sum_up(shifts, capacity, num_borders, unequal, BORDERS) | (depth > MAX_DEPTH)
    num_borders = tl.where(broken, 0, num_borders)
    info += row * 2 * num_documents + doc
    tl.store(info, first_border)
    tl.store(info + num_documents, num_borders)
    tl.store(malformed + row * num_documents + doc, broken.to(tl.uint8))
