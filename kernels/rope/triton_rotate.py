"""q and k rotated in one launch, forward and backward; `reference.py` holds the definition.

Arithmetic is float32 whatever the dtype of q and k (megatron-core's unfused path rounds cosines and sines to it).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .strides import with_near_heads
from .triton_heads import heads_per_step, move_heads


@triton.jit
def _rope_kernel(q_ptr, k_ptr, q_out, k_out, table_ptr, batch,
                 q_stride_s, q_stride_b, q_stride_h, k_stride_s, k_stride_b, k_stride_h, t_stride_b, t_stride_s,
                 Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr, HALF: tl.constexpr, LANES: tl.constexpr,
                 Q_STEP: tl.constexpr, K_STEP: tl.constexpr, BACKWARD: tl.constexpr):  # fmt: skip
    """One program per token: all heads of q and of k.

    `q_stride_s`, `_b` and `_h` are q's strides of tokens, batch and heads; the outputs are contiguous.
    """
    # Tokens are numbered like the rows of the contiguous outputs. int64, because a token's start may lie more than 2^31
    # elements into the tensor.
    token = tl.program_id(0).to(tl.int64)
    s, b = token // batch, token % batch
    # A row of the table holds HALF cosines, then HALF sines. LANES is HALF rounded up to a power of two, which Triton
    # wants; the mask leaves the lanes beyond HALF alone.
    lane = tl.arange(0, LANES)
    row = table_ptr + b * t_stride_b + s * t_stride_s
    cos = tl.load(row + lane, mask=lane < HALF, other=0.0)[None, :]
    sin = tl.load(row + HALF + lane, mask=lane < HALF, other=0.0)[None, :]
    # The gradient of a rotation is the rotation by the negative angle.
    if BACKWARD:
        sin = -sin
    width = 2 * HALF
    # There are no groups here: every head is a group of one.
    move_heads(q_ptr + s * q_stride_s + b * q_stride_b, q_out + token * (Q_HEADS * width), q_stride_h, 0, width, 0,
               cos, sin, Q_HEADS, 1, HALF, LANES, Q_STEP, True)  # fmt: skip
    move_heads(k_ptr + s * k_stride_s + b * k_stride_b, k_out + token * (K_HEADS * width), k_stride_h, 0, width, 0,
               cos, sin, K_HEADS, 1, HALF, LANES, K_STEP, True)  # fmt: skip


def _rotate(q: Tensor, k: Tensor, table: Tensor, *, backward: bool) -> tuple[Tensor, Tensor]:
    s, b, q_heads, dim = q.shape
    k_heads, half = k.shape[2], dim // 2
    q, k = with_near_heads(q), with_near_heads(k)
    q_out, k_out = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k))
    q_step, k_step = heads_per_step(q_heads), heads_per_step(k_heads)
    _rope_kernel[(s * b,)](
        q, k, q_out, k_out, table, b, *q.stride()[:3], *k.stride()[:3], *table.stride()[:2],
        Q_HEADS=q_heads, K_HEADS=k_heads, HALF=half, LANES=triton.next_power_of_2(half),
        Q_STEP=q_step, K_STEP=k_step, BACKWARD=backward, num_warps=4,
    )  # fmt: skip
    return q_out, k_out


class _Rope(torch.autograd.Function):
    """Forward rotates by the angle, backward by its negative. Only the table is saved for the backward pass."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(table)
        return _rotate(q, k, table, backward=False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        (table,) = ctx.saved_tensors
        dq, dk = _rotate(grads[0], grads[1], table, backward=True)
        return dq, dk, None


def rotate_triton(q: Tensor, k: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate q and k by the table of their tokens, in one launch.

    Args:
        q: [s, b, h, dim], float32, float16 or bfloat16. Strides are free; a last stride other than 1 costs a copy.
        k: [s, b, g, dim], like q.
        table: float32 [b, s, dim] by `rope_table`; it takes no gradient.

    Returns:
        Rotated q and k, new contiguous tensors.

    Raises:
        ValueError: shapes or dtypes do not fit.
    """
    s, b, _, dim = q.shape
    if q.dtype not in (torch.float32, torch.float16, torch.bfloat16) or k.dtype != q.dtype:
        raise ValueError(f"q and k must both be float32, float16 or bfloat16, got {q.dtype} and {k.dtype}")
    if k.shape[:2] != (s, b) or k.shape[3] != dim or dim % 2:
        raise ValueError(f"q [s, b, h, dim] and k [s, b, g, dim] do not fit: {tuple(q.shape)}, {tuple(k.shape)}")
    if table.shape != (b, s, dim) or table.dtype != torch.float32 or table.stride(-1) != 1:
        raise ValueError(f"table must be float32 {(b, s, dim)} by rope_table, got {table.dtype} {tuple(table.shape)}")
    rotated: tuple[Tensor, Tensor] = _Rope.apply(q, k, table)
    return rotated
