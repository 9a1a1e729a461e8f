"""Dense backend: torch's scaled_dot_product_attention with a mask. Any device, any float dtype."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .reference import visibility
from .tiles import TileLists


def dense_mask(r: Tensor, index: Tensor | None, dtype: torch.dtype, lists: TileLists | None = None) -> Tensor:
    """The mask of one microbatch, [b, 1, s, s]: boolean on the CPU, additive (0 or -inf) in `dtype` on CUDA.

    SDPA's CUDA kernels take additive masks only and would convert a boolean one again in every layer, and keep
    every copy for the backward pass.
    """
    visible = visibility(r, index)
    if not r.is_cuda:
        return visible
    hidden = torch.zeros(visible.shape, dtype=dtype, device=r.device)
    return hidden.masked_fill_(~visible, -torch.inf)


def dense_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, softmax_scale: float | None = None) -> Tensor:
    """Same contract as `multiverse_attention_reference`, by SDPA; `mask` is boolean or additive.

    On CUDA the key/value heads are repeated: SDPA's memory-efficient kernel takes arbitrary masks but no
    grouped heads, and the fallback would keep every score matrix for the backward pass.
    """
    grouped = q.shape[1] != k.shape[1]
    if grouped and q.is_cuda:
        repeats = q.shape[1] // k.shape[1]
        k, v, grouped = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1), False
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=softmax_scale, enable_gqa=grouped)
