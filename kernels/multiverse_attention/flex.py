"""FlexAttention backend: torch's own Triton kernels over our tile lists. CUDA; any head width they take.

The kernels are compiled once per shape. Lengths are rounded up to a few buckets per octave, so a changing length
does not compile again for each value, and the mask is a tensor, so a changing layout never does.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .tiles import TILE, TileLists, pad_labels, tile_lists

BUCKETS_PER_OCTAVE = 8
MAX_SHAPES = 64
"""Compiled variants that may live side by side (torch's own limit is 8, too few for the buckets of two octaves)."""


@dataclass(frozen=True)
class FlexPlan:
    """What all layers of a microbatch share."""

    block_mask: Any
    length: int


def flex_problem(device_type: str, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why this backend cannot run, or None."""
    if device_type != "cuda":
        return f"FlexAttention's kernels need a CUDA device, got {device_type}"
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"FlexAttention takes bfloat16, float16 and float32, got {dtype}"
    if head_dim < 16 or head_dim & (head_dim - 1):
        return f"FlexAttention takes head widths that are powers of two from 16, got {head_dim}"
    return None


def bucket_length(num_tokens: int) -> int:
    """The length to pad to: a multiple of TILE, at most 12.5 % longer where buckets are wider than a tile."""
    octave = 1 << max(num_tokens - 1, 1).bit_length()
    step = max(TILE, octave // (2 * BUCKETS_PER_OCTAVE))
    return -(-num_tokens // step) * step


def flex_plan(r: Tensor, index: Tensor | None, dtype: torch.dtype, lists: TileLists | None = None) -> FlexPlan:
    """Block mask of one microbatch from r [b, s]; `lists` are used if they have the tiles of this bucket."""
    from torch.nn.attention.flex_attention import BlockMask

    length = bucket_length(r.shape[1])
    if lists is None or not lists.fit(r, length):
        lists = tile_lists(r, index, length=length)
    labels = pad_labels(r, length)
    if index is None:

        def visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return (k <= q) & (labels[b, k] <= labels[b, q])

    else:
        places = pad_labels(index, length)

        def visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return (places[b, k] <= places[b, q]) & (labels[b, k] <= labels[b, q])

    block_mask = BlockMask.from_kv_blocks(
        lists.q_partial.counts,
        lists.q_partial.indices,
        lists.q_full.counts,
        lists.q_full.indices,
        BLOCK_SIZE=lists.size,
        mask_mod=visible,
        seq_lengths=(length, length),
    )
    return FlexPlan(block_mask, length)


@functools.cache
def _compiled() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    limit = torch._dynamo.config.recompile_limit
    torch._dynamo.config.recompile_limit = max(limit, MAX_SHAPES)
    # fullgraph: running out of variants must be an error, not attention by explicit score matrices
    return torch.compile(flex_attention, dynamic=False, fullgraph=True)


def flex_attention(q: Tensor, k: Tensor, v: Tensor, plan: FlexPlan, softmax_scale: float | None = None) -> Tensor:
    """Same contract as `multiverse_attention_reference`, with a plan instead of a mask."""
    num_tokens = q.shape[2]
    if plan.length != num_tokens:
        q, k, v = (F.pad(x, (0, 0, 0, plan.length - num_tokens)) for x in (q, k, v))
    grouped = q.shape[1] != k.shape[1]
    out: Tensor = _compiled()(q, k, v, block_mask=plan.block_mask, scale=softmax_scale, enable_gqa=grouped)
    return out[:, :, :num_tokens]
