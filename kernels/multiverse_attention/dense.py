"""Dense backend: torch's scaled_dot_product_attention with a mask. Any device, any float dtype."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .layout import AttentionCase, AttentionLayout
from .reference import visibility


@dataclass(frozen=True)
class DensePlan:
    """What all layers of a microbatch share."""

    mask: Tensor
    """[b, 1, s_q, s_k]: boolean on the CPU, additive (0 or -inf) on CUDA."""
    sees_any: Tensor | None = None
    """bool [b, 1, s_q, 1], if keys are other tokens than the queries. The softmax of a fully masked row would be NaN,
    so the mask shows such a query all keys, and its output is set to 0 afterwards."""


def dense_plan(layout: AttentionLayout, case: AttentionCase) -> DensePlan:
    """The mask of one microbatch. Tile lists are of no use here.

    SDPA's CUDA kernels take additive masks only. They would convert a boolean one again in every layer, and keep every
    copy for the backward pass.
    """
    visible = visibility(layout.r, layout.index, layout.key_r, layout.key_index)
    sees_any = None
    if layout.key_r is not None:
        sees_any = visible.any(-1, keepdim=True)
        visible |= ~sees_any
    if visible.is_cuda:
        hidden = torch.zeros(visible.shape, dtype=case.dtype, device=visible.device)
        return DensePlan(hidden.masked_fill_(~visible, -torch.inf), sees_any)
    return DensePlan(visible, sees_any)


def dense_attention(q: Tensor, k: Tensor, v: Tensor, plan: DensePlan, softmax_scale: float | None = None) -> Tensor:
    """Same contract as `multiverse_attention_reference`, by SDPA.

    On CUDA the key/value heads are repeated: SDPA's memory-efficient kernel takes arbitrary masks but no
    grouped heads, and the fallback would keep every score matrix for the backward pass.
    """
    grouped = q.shape[1] != k.shape[1]
    if grouped and q.is_cuda:
        repeats = q.shape[1] // k.shape[1]
        k, v, grouped = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1), False
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=plan.mask, scale=softmax_scale, enable_gqa=grouped)
    return out if plan.sees_any is None else out.masked_fill(~plan.sees_any, 0)
