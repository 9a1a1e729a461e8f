"""Is a document well-formed? Its tags checked by neighbours and levels, without a stack (see README.md)."""

from __future__ import annotations

import triton
import triton.language as tl

from .tags_triton import (
    BORDER,
    CONCLUSION,
    END_CONCLUSION,
    END_GOAL,
    END_OUTLINE,
    END_PARALLEL,
    END_PATH,
    END_THINK,
    GOAL,
    OUTLINE,
    PARALLEL,
    PATH,
    THINK,
    index_of,
    kind_of,
)

CLOSED_THINK = tl.constexpr(1 + (1 << 10))
"""Sum over one <Think> (1) and one </Think> (1 << 10)."""


TEXT = tl.constexpr(1 << 2 | 1 << 0 | 1 << 1)
"""<Parallel> <Think> </Think>, as bits of a mask over kinds. Where text stands, one of these may."""


@triton.jit
def allowed_next(kind):
    """The tags that may stand behind one of `kind`, as a bit mask over kinds (BORDER: the response begins)."""
    one = tl.full(kind.shape, 1, tl.int32)
    mask = tl.where((kind == BORDER) | (kind == THINK) | (kind == END_THINK), TEXT, 0)
    mask = tl.where(kind == END_PARALLEL, TEXT | one << END_PATH, mask)
    mask = tl.where(kind == PATH, one << PARALLEL | one << END_PATH, mask)
    mask = tl.where(kind == END_OUTLINE, one << OUTLINE | one << END_GOAL, mask)
    mask = tl.where(kind == END_PATH, one << PATH | one << CONCLUSION, mask)
    mask = tl.where(kind == PARALLEL, one << GOAL, mask)
    mask = tl.where(kind == GOAL, one << OUTLINE, mask)
    mask = tl.where(kind == OUTLINE, one << END_OUTLINE, mask)
    mask = tl.where(kind == END_GOAL, one << PATH, mask)
    mask = tl.where(kind == CONCLUSION, one << END_CONCLUSION, mask)
    return tl.where(kind == END_CONCLUSION, one << END_PARALLEL, mask)


@triton.jit
def _add2(a1, b1, a2, b2):
    return a1 + a2, b1 + b2


@triton.jit
def check_levels(raw, words, steps, n, MAX_DEPTH: tl.constexpr, BLOCK: tl.constexpr):
    """Find the level of every tag and check order and nesting; returns the deepest, over 8 if a rule is broken.

    words: tags with their level. steps: tokens since the tag before.
    """
    lane = tl.arange(0, BLOCK)
    deepest = tl.zeros((BLOCK,), tl.int32)
    level0, think0 = 0, 0
    for t0 in range(0, n, BLOCK):
        j = t0 + lane
        word = tl.load(raw + j, mask=j < n, other=BORDER)
        previous = tl.load(raw + j - 1, mask=(j > 0) & (j < n), other=BORDER)
        kind, before = kind_of(word), kind_of(previous)
        step = (kind == PARALLEL).to(tl.int32) - (before == END_PARALLEL).to(tl.int32)
        is_think = (kind == THINK) | (kind == END_THINK)
        thought = tl.where(is_think, tl.where(kind == THINK, 1, CLOSED_THINK - 1), 0)
        level, think = tl.associative_scan((step, thought), 0, _add2)
        level, think = level0 + level, think0 + think
        fits = ((allowed_next(before) >> kind) & 1) != 0
        fits &= tl.where(is_think, level == 0, (level > 0) & (level <= MAX_DEPTH))
        fits &= (kind != THINK) | (think == 1)
        fits &= (kind != END_THINK) | (think == CLOSED_THINK)
        closed = (level - (kind == END_PARALLEL).to(tl.int32) == 0) & ((think == 0) | (think == CLOSED_THINK))
        fits &= (j != n - 1) | closed
        deepest = tl.maximum(deepest, tl.where(j < n, tl.where(fits, level, MAX_DEPTH + 1), 0))
        tl.store(words + j, word | (level & 15) << 4, mask=j < n)
        tl.store(steps + j, index_of(word) - index_of(previous), mask=j < n)
        if t0 + BLOCK < n:
            is_last = lane == BLOCK - 1
            level0, think0 = tl.reduce((tl.where(is_last, level, 0), tl.where(is_last, think, 0)), 0, _add2)
    return tl.max(deepest, axis=0)
