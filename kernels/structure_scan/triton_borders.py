"""The borders of a document: they are listed by level, measured, and their shifts are summed up.

A border is a /Goal or a /Path; after it positions and labels shift. In the list of its level the borders of a block are
neighbours, whatever is nested between them. `documents_kernel` says what the arrays hold, README.md why this is enough.
The position rule is that of `structure/layout.py`; test_structure_scan.py compares the two on random documents.
"""

from __future__ import annotations

import triton
import triton.language as tl

from megatron_multiverse.structure import MAX_DEPTH

from .triton_tags import CONCLUSION, END_GOAL, END_PATH, index_of

LEVELS = tl.constexpr(MAX_DEPTH)


@triton.jit
def add2(a1, b1, a2, b2):
    """Sums of two numbers, for scans."""
    return a1 + a2, b1 + b2


@triton.jit
def ones(chosen, slot):
    """For each chosen tag a 1 in the field of its level, so that one prefix sum counts the tags of all levels at once.

    Two numbers hold the fields: `shallow` (int32) levels 1 to 3 in 10 bits each, `deep` (int64) levels 4 to 8 in 12
    bits each. Most documents need `shallow` alone.
    """
    is_shallow = slot < 3
    shallow = tl.where(chosen & is_shallow, 1 << tl.where(is_shallow, slot * 10, 0), 0)
    place = tl.where(is_shallow, 0, (slot - 3) * 12).to(tl.int64)
    return shallow, tl.where(chosen & (is_shallow == 0), tl.full(slot.shape, 1, tl.int64) << place, 0)


@triton.jit
def on_level(shallow, deep, slot):
    """The field of level slot + 1 in sums of `ones`: how many tags of that level were counted."""
    is_shallow = slot < 3
    near = (shallow >> tl.where(is_shallow, slot * 10, 0)) & 0x3FF
    far = (deep >> tl.where(is_shallow, 0, (slot - 3) * 12).to(tl.int64)).to(tl.int32) & 0xFFF
    return tl.where(is_shallow, near, far)


@triton.jit
def arrays(lists, stride):
    """Where word, rank, extra and around begin in a row's lists; see `documents_kernel`."""
    return lists, lists + LEVELS * stride, lists + 2 * LEVELS * stride, lists + 3 * LEVELS * stride


@triton.jit
def list_borders(word, kind, border, known, slot, rank, outlines, shallow, deep, earlier, lists, counted, shifts,
                 stride):  # fmt: skip
    """Write the borders among BLOCK tags into the lists of their levels.

    Args:
        border, known: which tags are borders, and which lie on levels 1 to 8.
        slot: level - 1.
        rank: borders of the document up to and with this tag.
        outlines: at /Goal the number of outlines of its block.
        shallow, deep: sums of `ones` up to and with this tag.
        earlier: whether `counted` holds the borders among the tags before these.
    """
    word_at, rank_at, extra_at, around_at = arrays(lists, stride)
    # The place of a border in its list is the number of borders of its level before it, among earlier tags and these.
    # Every other tag computes the place of the last border before it, which the end of a block uses.
    seen = tl.load(counted + slot, mask=known & earlier, other=0)
    mine = slot * stride + tl.maximum(seen + on_level(shallow, deep, slot) - 1, 0)
    listed, forks = border & known, known & (kind == END_GOAL)
    tl.store(word_at + mine, index_of(word) << 1 | (kind == END_PATH).to(tl.int32), mask=listed)
    tl.store(rank_at + mine, rank - 1, mask=listed)
    tl.store(extra_at + mine, tl.where(forks, outlines, 0), mask=listed)
    # A /Goal shifts no position. Its shift of r starts at 0, because two parts are added to it later.
    tl.store(shifts + rank - 1, 0, mask=forks)
    tl.store(shifts + stride + rank - 1, 0, mask=forks)
    # At a block's <Conclusion>, `mine` is the block's last /Path. The path around the block ends at the next border of
    # the level above, and that border's place is the number of borders listed there so far.
    outer = tl.maximum(slot - 1, 0)
    nested = known & (kind == CONCLUSION) & (slot > 0)
    around = tl.load(counted + outer, mask=nested & earlier, other=0) + on_level(shallow, deep, outer)
    tl.store(around_at + mine, around, mask=nested)


@triton.jit
def _of_block(due1, goal1, due2, goal2):
    """Join two neighbouring runs of borders of one level: what `measure` knows at the end of the joined run.

    The high half of `due` is not 0 in a run that has a /Goal. If the second run has one, a new block starts there and
    what the first run knew does not count; otherwise both belong to one block, whose longest path is the larger one.
    """
    newer = due2 >> 32 != 0
    longest = tl.maximum(due1 & 0xFFFFFFFF, due2 & 0xFFFFFFFF)
    return tl.where(newer, due2, (due1 & ~0xFFFFFFFF) | longest), tl.where(newer, goal2, goal1)


@triton.jit
def measure(lists, n, shifts, stride, slot, unequal, BORDERS: tl.constexpr):
    """Measure the blocks of level slot + 1, once all deeper ones are measured.

    Writes by how much positions and labels shift at each border, and adds to the path around each block how many
    positions more than tokens the block has there (not above 0, since only its longest path counts).

    What atomics have changed is loaded with .cg, past the L1 cache, which may hold stale values.

    Args:
        n: borders of this level.
        unequal: int32 [BORDERS], returned with a 1 where a block has not as many paths as outlines.
    """
    word_at, rank_at, extra_at, around_at = arrays(lists, stride)
    own = slot * stride
    lane = tl.arange(0, BORDERS)
    # Carries from one turn of the loop to the next: what `_of_block` knows of the block that is still open.
    due0, goal0 = tl.zeros((), tl.int64), tl.zeros((), tl.int64)
    for t0 in range(0, n, BORDERS):
        i = t0 + lane
        inside = i < n
        # Each border and its two neighbours in the list.
        word = tl.load(word_at + own + i, mask=inside, other=0)
        next_word = tl.load(word_at + own + i + 1, mask=i + 1 < n, other=0)
        last_word = tl.load(word_at + own + i - 1, mask=inside & (i > 0), other=0)
        extra = tl.load(extra_at + own + i, mask=inside, other=0, cache_modifier=".cg")
        rank = tl.load(rank_at + own + i, mask=inside, other=0)
        around = tl.load(around_at + own + i, mask=inside & (slot > 0), other=0)
        path = (word & 1) != 0
        last = path & ((next_word & 1) == 0)
        forks = inside & (path == 0)
        before, here, after = last_word >> 1, word >> 1, next_word >> 1
        # At a /Path: the positions of the path, which are its tokens, less what nested blocks save.
        positions = here - before + extra
        # The scan carries, from a /Goal over the paths of its block, two packed numbers. `due`: in the high half the
        # place of the block's last path if it has as many paths as outlines (extra), + 1; in the low half its longest
        # path so far. `goal`: in the high half the index of the /Goal, in the low half its rank.
        due = tl.where(forks, (i + extra + 1).to(tl.int64) << 32, tl.where(path, positions, 0).to(tl.int64))
        goal = tl.where(forks, here.to(tl.int64) << 32 | rank.to(tl.int64), 0)
        due, goal = tl.associative_scan((due, goal), 0, _of_block)
        due, goal = _of_block(due0, goal0, due, goal)
        longest, region = (due & 0xFFFFFFFF).to(tl.int32), here - (goal >> 32).to(tl.int32)
        unequal |= (last & ((due >> 32).to(tl.int32) != i + 1)).to(tl.int32)
        # At its last path a block is complete. Its positions (the longest path) less its tokens go to the path around
        # it.
        tl.atomic_add(extra_at + own - stride + around, longest - region, mask=last & (slot > 0), sem="relaxed",
                      scope="cta")  # fmt: skip
        # The shifts of README.md's table. The next path starts where this one did, so positions go back by this path,
        # and after the last path they go on after the longest.
        tl.store(shifts + rank, tl.where(last, longest, 0) - positions, mask=path)
        tl.store(shifts + stride + rank, tl.where(last, region - here + before, before - after), mask=path)
        # At /Goal r shifts by the region less the first path. The first path is known here, at the /Goal, the region
        # only at the last /Path; each adds its part.
        at = shifts + stride + tl.where(forks, rank, (goal & 0xFFFFFFFF).to(tl.int32))
        tl.atomic_add(at, tl.where(forks, here - after, region), mask=forks | last, sem="relaxed", scope="cta")
        # Carry what the last lane knows: a sum over lanes of which all others are 0 reads it.
        if t0 + BORDERS < n:
            at_end = lane == BORDERS - 1
            due0, goal0 = tl.reduce((tl.where(at_end, due, 0), tl.where(at_end, goal, 0)), 0, add2)
    return unequal


@triton.jit
def sum_up(shifts, stride, n, unequal, BORDERS: tl.constexpr):
    """Replace the shifts of n borders by their prefix sums: what holds before each border, and after the last one.

    Returns whether there is a 1 in unequal, which is looked up here to use the time that loads take.
    """
    lane = tl.arange(0, BORDERS)
    position0, r0, any_unequal = 0, 0, 0
    for t0 in range(0, n + 1, BORDERS):
        k = t0 + lane
        d_position = tl.load(shifts + k, mask=k < n, other=0, cache_modifier=".cg")
        d_r = tl.load(shifts + stride + k, mask=k < n, other=0, cache_modifier=".cg")
        any_unequal = tl.max(unequal, axis=0)
        position, r = tl.associative_scan((d_position, d_r), 0, add2)
        # A value may be loaded by several threads. None may store its sum before all have loaded.
        tl.debug_barrier()
        tl.store(shifts + k, position0 + position - d_position, mask=k <= n)
        tl.store(shifts + stride + k, r0 + r - d_r, mask=k <= n)
        if t0 + BORDERS <= n:
            at_end = lane == BORDERS - 1
            end_position, end_r = tl.reduce((tl.where(at_end, position, 0), tl.where(at_end, r, 0)), 0, add2)
            position0, r0 = position0 + end_position, r0 + end_r
    return any_unequal != 0
