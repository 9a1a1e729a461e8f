"""Is a document well-formed? Its tags checked by neighbours and levels, without a stack (see README.md)."""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_tags import (
    CONCLUSION,
    END_CONCLUSION,
    END_GOAL,
    END_OUTLINE,
    END_PARALLEL,
    END_PATH,
    END_THINK,
    GOAL,
    NONE,
    OUTLINE,
    PARALLEL,
    PATH,
    THINK,
    is_border,
)

CLOSED_THINK = tl.constexpr(1 + 8)
"""Sum over one <Think> (1) and one </Think> (8). Modulo 256 is enough: the first tag that is one too many breaks a rule
before a sum can come round."""

_TEXT = (PARALLEL, THINK, END_THINK)
"""Where text stands, one of these may."""
_AFTER = {
    NONE: _TEXT,
    THINK: _TEXT,
    END_THINK: _TEXT,
    PARALLEL: (GOAL,),
    GOAL: (OUTLINE,),
    OUTLINE: (END_OUTLINE,),
    END_OUTLINE: (OUTLINE, END_GOAL),
    END_GOAL: (PATH,),
    PATH: (PARALLEL, END_PATH),
    END_PATH: (PATH, CONCLUSION),
    CONCLUSION: (END_CONCLUSION,),
    END_CONCLUSION: (END_PARALLEL,),
    END_PARALLEL: (*_TEXT, END_PATH),
}
"""The tags that may stand behind one of each kind (NONE: the response begins)."""


def _packed(quarter: int) -> int:
    """The rows of _AFTER for four kinds, a mask of 16 bits each."""
    masks = {int(before.value): sum(1 << int(kind.value) for kind in after) for before, after in _AFTER.items()}
    return sum(masks.get(4 * quarter + k, 0) << (16 * k) for k in range(4))


_AFTER_0, _AFTER_4, _AFTER_8, _AFTER_12 = (tl.constexpr(_packed(quarter)) for quarter in range(4))


@triton.jit
def allowed_next(kind):
    """The tags that may stand behind one of `kind`, as a bit mask over kinds: a row of _AFTER."""
    rows = tl.where(kind < 4, _AFTER_0, tl.where(kind < 8, _AFTER_4, tl.where(kind < 12, _AFTER_8, _AFTER_12)))
    return (rows >> ((kind & 3) * 16).to(tl.int64)).to(tl.int32) & 0xFFFF


@triton.jit
def steps(kind, before):
    """What each tag adds to its document's level, number of borders and think tags. Sums of up to 1024 tags fit in an
    int32: levels in 12 bits with a sign, borders in 12, think tags in 8, which may overflow (CLOSED_THINK says why).

    Args:
        kind, before: of the tag, and of the tag in front of it (NONE: there is none).
    """
    level = (kind == PARALLEL).to(tl.int32) - (before == END_PARALLEL).to(tl.int32)
    think = (kind == THINK).to(tl.int32) + (CLOSED_THINK - 1) * (kind == END_THINK).to(tl.int32)
    return level + (is_border(kind).to(tl.int32) << 12) + (think << 24)


@triton.jit
def unpack(sums):
    """Level, borders and think tags (modulo 256) of sums of `steps`."""
    level = (sums << 20) >> 20
    rest = (sums - level) >> 12
    return level, rest & 0xFFF, (rest >> 12) & 0xFF


@triton.jit
def fits(kind, before, level, think, is_last, MAX_DEPTH: tl.constexpr):
    """Whether each tag may stand where it stands.

    Args:
        kind, before: of the tag, and of the tag in front of it (NONE: there is none).
        level: blocks around the tag, its own included.
        think: 1 per <Think> and CLOSED_THINK - 1 per </Think>, up to and with this tag.
        is_last: the response has no further tag.
    """
    is_think = (kind == THINK) | (kind == END_THINK)
    right = ((allowed_next(before) >> kind) & 1) != 0
    right &= tl.where(is_think, level == 0, (level > 0) & (level <= MAX_DEPTH))
    right &= (kind != THINK) | (think == 1)
    right &= (kind != END_THINK) | (think == CLOSED_THINK)
    closed = (level - (kind == END_PARALLEL).to(tl.int32) == 0) & ((think == 0) | (think == CLOSED_THINK))
    return right & (closed | (is_last == 0))
