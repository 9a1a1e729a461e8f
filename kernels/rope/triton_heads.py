"""How both rotary kernels move the heads of one token; they differ in where heads come from and go to."""

from __future__ import annotations

import triton
import triton.language as tl

MAX_HEADS_PER_STEP = 64
"""Heads that a program holds in registers at a time."""


def heads_per_step(heads: int) -> int:
    """Heads to move at a time: a power of two, as Triton wants it, and at most MAX_HEADS_PER_STEP."""
    return min(MAX_HEADS_PER_STEP, triton.next_power_of_2(heads))


@triton.jit
def move_heads(source, target, s_group, s_head, t_group, t_head, cos, sin, heads, PER_GROUP: tl.constexpr,
               HALF: tl.constexpr, LANES: tl.constexpr, STEP: tl.constexpr, ROTATE: tl.constexpr):  # fmt: skip
    """Copy the heads of one token from `source` to `target`, rotated if ROTATE.

    Args:
        source, target: where the token's first head begins.
        s_group, s_head: stride of the source from group to group, and from head to head in a group.
        t_group, t_head: the same of the target.
        cos, sin: [1, LANES] of the token.
        heads: number of heads, PER_GROUP of them in each group.
        HALF: half the width of a head; LANES >= HALF and STEP are powers of two.
    """
    lane = tl.arange(0, LANES)[None, :]
    kind = target.dtype.element_ty
    for start in range(0, heads, STEP):
        # A tile of STEP heads (rows) by LANES pairs (columns).
        head = start + tl.arange(0, STEP)[:, None]
        inside = (head < heads) & (lane < HALF)
        group, place = head // PER_GROUP, head % PER_GROUP
        src = source + group * s_group + place * s_head + lane
        dst = target + group * t_group + place * t_head + lane
        # Element i of a head makes a pair with element i + HALF, and the pair is turned by its angle.
        first = tl.load(src, mask=inside, other=0.0)
        second = tl.load(src + HALF, mask=inside, other=0.0)
        if ROTATE:
            a, b = first.to(tl.float32), second.to(tl.float32)
            tl.store(dst, (a * cos - b * sin).to(kind), mask=inside)
            tl.store(dst + HALF, (b * cos + a * sin).to(kind), mask=inside)
        else:
            tl.store(dst, first, mask=inside)
            tl.store(dst + HALF, second, mask=inside)
