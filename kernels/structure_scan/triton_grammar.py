"""Is a document well-formed? Its tags are checked by their neighbours and levels, without a stack (see README.md).

This is the grammar of `structure/machine.py`, as far as it concerns tags. test_structure_scan.py and the interpreter's
`check_malformed` compare the two on random and damaged documents.
"""

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
"""The count after one <Think> (1) and one </Think> (8). The counter wraps at 256, which does no harm: a second <Think>
already breaks a rule, long before that."""

_TEXT = (PARALLEL, THINK, END_THINK)
"""The tags that may come where text stands."""
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
"""Kind -> the kinds that may come next (NONE: the response begins)."""


def _packed(quarter: int) -> int:
    """Four rows of _AFTER, for the kinds from 4 * quarter on, as bit masks of 16 bits side by side in an int64."""
    masks = {int(before.value): sum(1 << int(kind.value) for kind in after) for before, after in _AFTER.items()}
    return sum(masks.get(4 * quarter + k, 0) << (16 * k) for k in range(4))


_AFTER_0, _AFTER_4, _AFTER_8, _AFTER_12 = (tl.constexpr(_packed(quarter)) for quarter in range(4))


@triton.jit
def allowed_next(kind):
    """The kinds that may come after `kind`: a row of _AFTER, as a bit mask."""
    rows = tl.where(kind < 4, _AFTER_0, tl.where(kind < 8, _AFTER_4, tl.where(kind < 12, _AFTER_8, _AFTER_12)))
    return (rows >> ((kind & 3) * 16).to(tl.int64)).to(tl.int32) & 0xFFFF


@triton.jit
def steps(kind, before):
    """What each tag adds to its document's level, number of borders and count of think tags, packed into an int32.

    The fields hold sums over up to 1024 tags: the level has 12 bits with a sign, borders 12 bits, think tags 8 bits,
    which may wrap (CLOSED_THINK says why). A tag belongs to the block it closes, so </Parallel> lowers the level only
    at the next tag.

    Args:
        kind, before: kind of the tag, and of the tag before it (NONE: there is none).
    """
    level = (kind == PARALLEL).to(tl.int32) - (before == END_PARALLEL).to(tl.int32)
    think = (kind == THINK).to(tl.int32) + (CLOSED_THINK - 1) * (kind == END_THINK).to(tl.int32)
    return level + (is_border(kind).to(tl.int32) << 12) + (think << 24)


@triton.jit
def unpack(sums):
    """Level, borders and think tags (modulo 256) of sums of `steps`."""
    # The level may be negative: shifting it up and down again spreads its sign, and subtracting it leaves the others.
    level = (sums << 20) >> 20
    rest = (sums - level) >> 12
    return level, rest & 0xFFF, (rest >> 12) & 0xFF


@triton.jit
def fits(kind, before, level, think, is_last, MAX_DEPTH: tl.constexpr):
    """Whether each tag may stand where it stands.

    Args:
        kind, before: kind of the tag, and of the tag before it (NONE: there is none).
        level: blocks around the tag; the tags of a block count as inside it.
        think: 1 per <Think> and CLOSED_THINK - 1 per </Think>, up to and with this tag.
        is_last: the response has no further tag.
    """
    is_think = (kind == THINK) | (kind == END_THINK)
    right = ((allowed_next(before) >> kind) & 1) != 0
    right &= tl.where(is_think, level == 0, (level > 0) & (level <= MAX_DEPTH))
    right &= (kind != THINK) | (think == 1)
    right &= (kind != END_THINK) | (think == CLOSED_THINK)
    # The last tag must leave no block open, and no <Think> either.
    closed = (level - (kind == END_PARALLEL).to(tl.int32) == 0) & ((think == 0) | (think == CLOSED_THINK))
    return right & (closed | (is_last == 0))
