"""The borders of a document, level by level: listed, measured, and what they shift summed up.

A border is a /Goal or a /Path: behind it positions and labels shift. In the list of its level a block's borders stand
side by side, whatever is nested in between. `documents_kernel` says what the arrays hold.
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
    """1 in the field of its level for each chosen tag. Two numbers: `shallow` has levels 1 to 3 in 10 bits each, `deep`
    levels 4 to 8 in 12 bits each."""
    is_shallow = slot < 3
    shallow = tl.where(chosen & is_shallow, 1 << tl.where(is_shallow, slot * 10, 0), 0)
    place = tl.where(is_shallow, 0, (slot - 3) * 12).to(tl.int64)
    return shallow, tl.where(chosen & (is_shallow == 0), tl.full(slot.shape, 1, tl.int64) << place, 0)


@triton.jit
def on_level(shallow, deep, slot):
    """The field of level slot + 1 in sums of `ones`."""
    is_shallow = slot < 3
    near = (shallow >> tl.where(is_shallow, slot * 10, 0)) & 0x3FF
    far = (deep >> tl.where(is_shallow, 0, (slot - 3) * 12).to(tl.int64)).to(tl.int32) & 0xFFF
    return tl.where(is_shallow, near, far)


@triton.jit
def arrays(lists, stride):
    """word, rank, extra, around: the parts of a row's lists, see `documents_kernel`."""
    return lists, lists + LEVELS * stride, lists + 2 * LEVELS * stride, lists + 3 * LEVELS * stride


@triton.jit
def list_borders(word, kind, border, known, slot, rank, outlines, shallow, deep, earlier, lists, counted, shifts,
                 stride):  # fmt: skip
    """Write the borders among a block of tags into the lists of their levels.

    Args:
        border, known: which tags are borders, and which lie on levels 1 to 8.
        slot: level - 1.
        rank: borders of the document up to and with this tag.
        outlines: at /Goal those of its block.
        shallow, deep: sums of `ones` up to and with this tag.
        earlier: whether `counted` holds the borders of tags before this block.
    """
    word_at, rank_at, extra_at, around_at = arrays(lists, stride)
    seen = tl.load(counted + slot, mask=known & earlier, other=0)
    mine = slot * stride + tl.maximum(seen + on_level(shallow, deep, slot) - 1, 0)
    listed, forks = border & known, known & (kind == END_GOAL)
    tl.store(word_at + mine, index_of(word) << 1 | (kind == END_PATH).to(tl.int32), mask=listed)
    tl.store(rank_at + mine, rank - 1, mask=listed)
    tl.store(extra_at + mine, tl.where(forks, outlines, 0), mask=listed)
    tl.store(shifts + rank - 1, 0, mask=forks)
    tl.store(shifts + stride + rank - 1, 0, mask=forks)
    # behind a block the next border on the level above ends the path around it; `mine` is the block's last /Path
    outer = tl.maximum(slot - 1, 0)
    nested = known & (kind == CONCLUSION) & (slot > 0)
    around = tl.load(counted + outer, mask=nested & earlier, other=0) + on_level(shallow, deep, outer)
    tl.store(around_at + mine, around, mask=nested)


@triton.jit
def _of_block(due1, goal1, due2, goal2):
    """Runs of borders of a level; the high half of `due` is not 0 where a run has a /Goal. See `measure`."""
    newer = due2 >> 32 != 0
    longest = tl.maximum(due1 & 0xFFFFFFFF, due2 & 0xFFFFFFFF)
    return tl.where(newer, due2, (due1 & ~0xFFFFFFFF) | longest), tl.where(newer, goal2, goal1)


@triton.jit
def measure(lists, n, shifts, stride, slot, unequal, BORDERS: tl.constexpr):
    """The blocks of level slot + 1, when all deeper ones are measured: what their borders shift, and the difference
    (not above 0) between positions and tokens that each block makes to the path around it.

    Numbers that atomics have changed are loaded past the L1 cache (.cg), where they may stand as they were.

    Args:
        n: borders of this level.
        unequal: int32 [BORDERS], returned with a 1 where a block has not as many paths as outlines.
    """
    word_at, rank_at, extra_at, around_at = arrays(lists, stride)
    own = slot * stride
    lane = tl.arange(0, BORDERS)
    due0, goal0 = tl.zeros((), tl.int64), tl.zeros((), tl.int64)
    for t0 in range(0, n, BORDERS):
        i = t0 + lane
        inside = i < n
        word = tl.load(word_at + own + i, mask=inside, other=0)
        behind = tl.load(word_at + own + i + 1, mask=i + 1 < n, other=0)
        front = tl.load(word_at + own + i - 1, mask=inside & (i > 0), other=0)
        extra = tl.load(extra_at + own + i, mask=inside, other=0, cache_modifier=".cg")
        rank = tl.load(rank_at + own + i, mask=inside, other=0)
        around = tl.load(around_at + own + i, mask=inside & (slot > 0), other=0)
        path = (word & 1) != 0
        last = path & ((behind & 1) == 0)
        forks = inside & (path == 0)
        before, here, after = front >> 1, word >> 1, behind >> 1
        positions = here - before + extra
        # due: number of the block's last path if it has as many as outlines (extra), + 1; and its longest path so far
        due = tl.where(forks, (i + extra + 1).to(tl.int64) << 32, tl.where(path, positions, 0).to(tl.int64))
        goal = tl.where(forks, here.to(tl.int64) << 32 | rank.to(tl.int64), 0)
        due, goal = tl.associative_scan((due, goal), 0, _of_block)
        due, goal = _of_block(due0, goal0, due, goal)
        longest, region = (due & 0xFFFFFFFF).to(tl.int32), here - (goal >> 32).to(tl.int32)
        unequal |= (last & ((due >> 32).to(tl.int32) != i + 1)).to(tl.int32)
        tl.atomic_add(extra_at + own - stride + around, longest - region, mask=last & (slot > 0), sem="relaxed",
                      scope="cta")  # fmt: skip
        tl.store(shifts + rank, tl.where(last, longest, 0) - positions, mask=path)
        tl.store(shifts + stride + rank, tl.where(last, region - here + before, before - after), mask=path)
        # a /Goal shifts labels by the region without its first path: two parts, known in two places
        at = shifts + stride + tl.where(forks, rank, (goal & 0xFFFFFFFF).to(tl.int32))
        tl.atomic_add(at, tl.where(forks, here - after, region), mask=forks | last, sem="relaxed", scope="cta")
        if t0 + BORDERS < n:
            at_end = lane == BORDERS - 1
            due0, goal0 = tl.reduce((tl.where(at_end, due, 0), tl.where(at_end, goal, 0)), 0, add2)
    return unequal


@triton.jit
def sum_up(shifts, stride, n, unequal, BORDERS: tl.constexpr):
    """Prefix sums of what the borders shift, in place: what holds before each border, and behind the last. Returns
    whether there is a 1 in unequal."""
    lane = tl.arange(0, BORDERS)
    position0, r0, any_unequal = 0, 0, 0
    for t0 in range(0, n + 1, BORDERS):
        k = t0 + lane
        d_position = tl.load(shifts + k, mask=k < n, other=0, cache_modifier=".cg")
        d_r = tl.load(shifts + stride + k, mask=k < n, other=0, cache_modifier=".cg")
        any_unequal = tl.max(unequal, axis=0)  # while the loads are on their way
        position, r = tl.associative_scan((d_position, d_r), 0, add2)
        tl.debug_barrier()  # threads without a border of their own load what others store
        tl.store(shifts + k, position0 + position - d_position, mask=k <= n)
        tl.store(shifts + stride + k, r0 + r - d_r, mask=k <= n)
        if t0 + BORDERS <= n:
            at_end = lane == BORDERS - 1
            end_position, end_r = tl.reduce((tl.where(at_end, position, 0), tl.where(at_end, r, 0)), 0, add2)
            position0, r0 = position0 + end_position, r0 + end_r
    return any_unequal != 0
