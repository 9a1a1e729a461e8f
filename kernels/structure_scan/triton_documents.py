"""Launch 2 of the scan: one program per document checks its tags and computes by how much each border shifts.

The program reads BLOCK tags at a time and carries sums over, so a document may hold any number of tags. Then it
measures the borders level by level, the deepest first (`triton_borders.py`).
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
    """Where in its row of scratch memory a document keeps its borders, of which the first is number `first` of the row.

    Documents keep them one after the other, each with one more place for what holds after its last border. Every place
    is a multiple of 4, for aligned access; rows begin at multiples of 16.
    """
    return ((first + 3) // 4 + doc) * 4


@triton.jit
def document_starts(documents, num_documents, num_tokens, DOCS: tl.constexpr):
    """int32 [DOCS]: where each document starts, and s after the last one.

    Whatever the input says, starts lie within [0, s], none comes before the one in front of it, and the first is 0.
    They are read with .cg, past the L1 cache: the launch before may still run, and the cache may hold what stood there
    for an earlier one.
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
    """BLOCK tags of the row, one per lane, and the tag before each (for the first lane it is not looked up).

    Each chunk has its tags at the start of CHUNK slots of its own, and lanes are to get them without the gaps. So every
    chunk stores a mark at the lane its tags begin at: mark = (slot of its first tag) - (that lane), so that mark + lane
    is the slot of a lane's tag. Marks grow from chunk to chunk, so a running maximum hands each lane the mark of the
    last chunk that began at or before it.

    Args:
        counts, begins: [CHUNKS] number of tags of each chunk, and the lane of the first one; negative if that tag was
            among earlier ones.
        marks: int32 [BLOCK] of scratch memory.
        inside: the lanes that have a tag.
    """
    lane, chunk = tl.arange(0, BLOCK), tl.arange(0, CHUNKS)
    # Lanes and chunks are different threads, so marks go through memory, with barriers between the steps.
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
    """Read the n tags of a document, check them, and list the borders of each level.

    Returns the deepest level, above MAX_DEPTH if a rule is broken, and how many borders of each level the last BLOCK
    tags hold, as sums of `ones`; `counted` has those of all tags before.
    """
    tl.static_assert(BLOCK < 1024, "fields of ones hold less than 1024")
    tl.static_assert(LEVELS == 8, "ones has fields for 8 levels")
    lane = tl.arange(0, BLOCK)
    # Carries: what holds after the tags of earlier turns. goal0 is the number of the last <Goal>, last0 the last tag.
    deepest, level0, think0, rank0, goal0, last0 = 0, 0, 0, 0, 0, NONE
    all_shallow, all_deep = 0, tl.full((), 0, tl.int64)
    for t0 in range(0, n, BLOCK):
        j = t0 + lane
        inside = j < n
        word, previous = _pick(tags, counts, begins - t0, marks, inside, CHUNKS, CHUNK, BLOCK)
        previous = tl.where(lane == 0, last0, previous)
        kind, before = kind_of(word), kind_of(previous)
        border = is_border(kind)
        # One scan for all running numbers of a tag: level, borders, think tags, and the last <Goal> at or before it.
        sums, goal = tl.associative_scan((steps(kind, before), tl.where(kind == GOAL, j, 0)), 0, _add_and_latest)
        level, rank, think = unpack(sums)
        level, rank, think, goal = level0 + level, rank0 + rank, (think0 + think) & 0xFF, tl.maximum(goal0, goal)
        right = fits(kind, before, level, think, j == n - 1, MAX_DEPTH)
        # The level of a malformed document may be anything. The mask keeps its slot among the lists there are; `known`
        # keeps its borders out of them.
        slot = (level - 1) & (LEVELS - 1)
        known = (level > 0) & (level <= LEVELS) & inside
        one, one_deep = ones(border & known, slot)
        reached = tl.where(inside, tl.where(right, level, MAX_DEPTH + 1), 0)
        reached, all_shallow = tl.reduce((reached, one), 0, _most_and_sum)
        deepest = tl.maximum(deepest, reached)
        shallow, deep, all_deep = tl.cumsum(one, axis=0), one_deep * 0, tl.full((), 0, tl.int64)
        # Fields of the deeper levels are summed only where a document reaches them.
        if reached > 3:
            deep, all_deep = tl.cumsum(one_deep, axis=0), tl.sum(one_deep, axis=0)
        # Only outlines, of two tags each, stand between <Goal> and </Goal>, so their number is half that of the tags.
        list_borders(word, kind, border, known, slot, rank, (j - goal - 1) // 2, shallow, deep, t0 > 0, lists, counted,
                     shifts, stride)  # fmt: skip
        if t0 + BLOCK < n:
            # More tags follow: carry what the last lane knows, and count the borders of each level in `counted`.
            each_level = tl.arange(0, LEVELS)
            seen = tl.load(counted + each_level, mask=t0 > 0, other=0)
            at_end = lane == BLOCK - 1
            sums0, goal0, last0 = tl.reduce(
                (tl.where(at_end, sums, 0), tl.where(at_end, goal, 0), tl.where(at_end, word, 0)), 0, _add3
            )
            up, more, thought = unpack(sums0)
            level0, rank0, think0 = level0 + up, rank0 + more, think0 + thought
            tl.debug_barrier()
            tl.store(counted + each_level, seen + on_level(all_shallow, all_deep, each_level))
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
        marks: int32 [b, D, BLOCK + 1], see `_pick`. The odd stride keeps accesses from being vectorised. So all tensors
            over tags have the same layout in registers, and none is converted through shared memory.
        lists: int32 [b, 4, MAX_DEPTH, capacity], capacity = 16 * rows_of_16 >= s + 4 D. For each level its borders in
            text order, those of a document from `place_of` on. The four parts:
            word: index << 1, + 1 for a /Path.
            rank: number of the border among all borders of the document.
            extra: at /Path positions less tokens of the blocks in the path; at /Goal the outlines of the block.
            around: at the last /Path of a block, where in the list of the level above the /Path stands that ends the
                path around the block.
        counted: int32 [b, D, MAX_DEPTH] borders of each level among the tags read so far.
        shifts: int32 [b, 2, capacity] position - index and r - index, before each border and after the last one; those
            of the document itself (its start, the documents after it) are added in launch 3.
        info: int32 [b, 2, D] number in the row of the document's first border; number of its borders, 0 if malformed.
        malformed: uint8 [b, D].
        BLOCK, BORDERS: how many tags, and borders of a level, are taken at a time.
        CHAINED: this launch may begin while the one before still runs.
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
        # Launch 3 reads what launch 1 wrote without a wait, so it may start only now, after launch 1 has ended.
        cuda.gdc_launch_dependents()
    # Find the document's tags: those of the chunks it touches, less those of its first chunk that stand before the
    # response, and those of its last chunk that stand after its end.
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
    # Level by level, the deepest first: what a level's blocks are worth is added to the paths of the level above. A
    # malformed document (depth > MAX_DEPTH) is not measured.
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
