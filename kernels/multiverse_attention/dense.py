"""Dense backend: torch's scaled_dot_product_attention with the boolean mask. Any device, any float dtype."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def dense_attention(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor, softmax_scale: float | None = None
) -> Tensor:
    """Same contract as `multiverse_attention_reference`, by SDPA.

    On CUDA the key/value heads are repeated: SDPA's memory-efficient kernel takes arbitrary masks but no
    grouped heads, and the fallback would keep every score matrix for the backward pass.
    """
    grouped = q.shape[1] != k.shape[1]
    if grouped and q.is_cuda:
        repeats = q.shape[1] // k.shape[1]
        k, v, grouped = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1), False
    return F.scaled_dot_product_attention(q, k, v, attn_mask=visible, scale=softmax_scale, enable_gqa=grouped)
