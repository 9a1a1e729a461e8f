"""What the kernels ask of the strides of a tensor of heads."""

from __future__ import annotations

from torch import Tensor

MAX_OFFSET = 2**31 - 1
"""Largest distance, in elements, between two elements of one token: the kernels compute it in int32."""


def heads_fit(x: Tensor) -> bool:
    """Whether a kernel can walk the heads of a token: x [s, b, heads, width] has 1 as its last stride, and no element
    of a token lies more than `MAX_OFFSET` elements after the token's first one."""
    heads, width = x.shape[2:]
    return x.stride(3) == 1 and max(heads - 1, 0) * x.stride(2) + max(width - 1, 0) <= MAX_OFFSET


def with_near_heads(x: Tensor) -> Tensor:
    """x [s, b, heads, width] itself if `heads_fit`, else a contiguous copy."""
    return x if heads_fit(x) else x.contiguous()
