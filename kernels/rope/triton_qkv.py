"""The mixed query/key/value projection split and rotated in one launch, forward and backward.

megatron-core's `linear_qkv` writes, per token and group, the group's queries, its key and its value side by side.
One kernel reads that once and writes rotated q, rotated k and v, each in memory of its own; backward writes the three
gradients straight into the gradient of the projection. v is copied rather than viewed: a view would keep the whole
projection alive until the backward pass, and its gradient would need a kernel of its own.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .reference import check_qkv
from .strides import with_near_heads
from .triton_heads import heads_per_step, move_heads


@triton.jit
def _qkv_kernel(mixed, q, k, v, table, batch, m_s, m_b, m_g, q_s, q_b, q_h, k_s, k_b, k_h, v_s, v_b, v_h, t_b, t_s,
                GROUPS: tl.constexpr, PER_GROUP: tl.constexpr, HALF: tl.constexpr, LANES: tl.constexpr,
                Q_STEP: tl.constexpr, K_STEP: tl.constexpr, BACKWARD: tl.constexpr):  # fmt: skip
    """One program per token. Forward: from mixed to q, k and v. Backward: from the gradients q, k, v to that of mixed.

    The name of a stride ends in its axis: `m_s`, `m_b` and `m_g` lead in mixed to the next token, row of the batch and
    group, `q_h` leads to the next head of q, `t_b` and `t_s` belong to the table.
    """
    # Tokens are numbered like the rows of a contiguous [s, b, ...] tensor. int64, because a token's start may lie more
    # than 2^31 elements into the tensor.
    token = tl.program_id(0).to(tl.int64)
    s, b = token // batch, token % batch
    # A row of the table holds HALF cosines, then HALF sines. LANES is HALF rounded up to a power of two, which Triton
    # wants; the mask leaves the lanes beyond HALF alone.
    lane = tl.arange(0, LANES)
    row = table + b * t_b + s * t_s
    cos = tl.load(row + lane, mask=lane < HALF, other=0.0)[None, :]
    sin = tl.load(row + HALF + lane, mask=lane < HALF, other=0.0)[None, :]
    mixed += s * m_s + b * m_b
    q += s * q_s + b * q_b
    k += s * k_s + b * k_b
    v += s * v_s + b * v_b
    # In a group of mixed the queries stand first, then the key, then the value, each `m_h` elements wide.
    m_h = 2 * HALF
    mixed_k, mixed_v = mixed + PER_GROUP * m_h, mixed + (PER_GROUP + 1) * m_h
    # The same three moves either way. The gradient of a rotation is the rotation by the negative angle, hence -sin.
    if BACKWARD:
        move_heads(q, mixed, q_h * PER_GROUP, q_h, m_g, m_h, cos, -sin, GROUPS * PER_GROUP, PER_GROUP, HALF, LANES,
                   Q_STEP, True)  # fmt: skip
        move_heads(k, mixed_k, k_h, 0, m_g, 0, cos, -sin, GROUPS, 1, HALF, LANES, K_STEP, True)
        move_heads(v, mixed_v, v_h, 0, m_g, 0, cos, sin, GROUPS, 1, HALF, LANES, K_STEP, False)
    else:
        move_heads(mixed, q, m_g, m_h, q_h * PER_GROUP, q_h, cos, sin, GROUPS * PER_GROUP, PER_GROUP, HALF, LANES,
                   Q_STEP, True)  # fmt: skip
        move_heads(mixed_k, k, m_g, 0, k_h, 0, cos, sin, GROUPS, 1, HALF, LANES, K_STEP, True)
        move_heads(mixed_v, v, m_g, 0, v_h, 0, cos, sin, GROUPS, 1, HALF, LANES, K_STEP, False)


def _launch(mixed: Tensor, q: Tensor, k: Tensor, v: Tensor, table: Tensor, *, backward: bool) -> None:
    s, b, groups, _ = mixed.shape
    heads, dim = q.shape[2:]
    q_step, k_step = heads_per_step(heads), heads_per_step(groups)
    _qkv_kernel[(s * b,)](
        mixed, q, k, v, table, b, *mixed.stride()[:3], *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
        *table.stride()[:2], GROUPS=groups, PER_GROUP=heads // groups, HALF=dim // 2,
        LANES=triton.next_power_of_2(dim // 2), Q_STEP=q_step, K_STEP=k_step, BACKWARD=backward, num_warps=4,
    )  # fmt: skip


class _RopeQKV(torch.autograd.Function):
    """Forward splits and rotates by the angle, backward rotates by its negative and writes the three gradients side by
    side. Only the table is saved for the backward pass."""

    @staticmethod
    def forward(ctx: Any, mixed: Tensor, table: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        s, b, groups, width = mixed.shape
        dim = table.shape[2]
        mixed = with_near_heads(mixed)
        q, k, v = (mixed.new_empty(s, b, heads, dim) for heads in (groups * (width // dim - 2), groups, groups))
        _launch(mixed, q, k, v, table, backward=False)
        ctx.save_for_backward(table)
        return q, k, v

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (table,) = ctx.saved_tensors
        dq, dk, dv = map(with_near_heads, grads)
        s, b, heads, dim = dq.shape
        groups = dk.shape[2]
        dmixed = dq.new_empty(s, b, groups, (heads // groups + 2) * dim)
        _launch(dmixed, dq, dk, dv, table, backward=True)
        return dmixed, None


def split_and_rotate_triton(mixed: Tensor, table: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Split the mixed projection into q, k, v and rotate q and k, in one launch; `rotate_qkv_by_table` says what.

    Args:
        mixed: [s, b, g, (h / g + 2) * dim], float32, float16 or bfloat16; per group its queries, its key, its value.
        table: float32 [b, s, dim] by `rope_table`; it takes no gradient.

    Returns:
        q [s, b, h, dim], k and v [s, b, g, dim]: new contiguous tensors.

    Raises:
        ValueError: shapes or dtypes do not fit.
    """
    check_qkv(mixed, table)
    if mixed.dtype not in (torch.float32, torch.float16, torch.bfloat16) or table.dtype != torch.float32:
        raise ValueError(
            "mixed must be float32, float16 or bfloat16 and the table float32, "
            f"got {mixed.dtype} and {table.dtype}; rotate_qkv_by_table takes any dtype"
        )
    split: tuple[Tensor, Tensor, Tensor] = _RopeQKV.apply(mixed, table if table.stride(-1) == 1 else table.contiguous())
    return split
