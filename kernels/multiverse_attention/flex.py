"""FlexAttention backend: torch's own Triton kernels over our tile lists. It runs on CUDA.

The kernels are compiled once per shape. Lengths are rounded up to a few buckets per octave, so a changing length
does not compile again for each value, and the mask is a tensor, so a changing layout never does.
"""

from __future__ import annotations

import functools
import importlib.util
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .layout import AttentionCase, AttentionLayout
from .tiles import TILE, pad_labels

BUCKETS_PER_OCTAVE = 8
MAX_SHAPES = 64
"""How many compiled variants torch may keep. Its own limit, 8, is too low for the buckets of two octaves."""


@dataclass(frozen=True)
class FlexPlan:
    """What all layers of a microbatch share."""

    block_mask: Any
    queries: int
    keys: int
    """Lengths of the buckets."""


def flex_problem(case: AttentionCase) -> str | None:
    """Why this backend cannot run, or None."""
    if case.device_type != "cuda":
        return f"FlexAttention's kernels need a CUDA device, got {case.device_type}"
    if case.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"FlexAttention takes bfloat16, float16 and float32, got {case.dtype}"
    if case.head_dim < 16 or case.head_dim & (case.head_dim - 1):
        return f"FlexAttention takes head widths that are powers of two from 16, got {case.head_dim}"
    if importlib.util.find_spec("triton") is None:
        return "FlexAttention's kernels need Triton, which is not installed (pip install 'megatron-multiverse[gpu]')"
    return None


def bucket_length(num_tokens: int) -> int:
    """The length to pad to: the next multiple of TILE, or for long sequences of a bucket that adds at most 12.5 %."""
    octave = 1 << max(num_tokens - 1, 1).bit_length()
    step = max(TILE, octave // (2 * BUCKETS_PER_OCTAVE))
    return -(-num_tokens // step) * step


def flex_plan(layout: AttentionLayout, case: AttentionCase) -> FlexPlan:
    """The block mask of one microbatch. Tile lists that the layout brings are used if they fit this bucket."""
    from torch.nn.attention.flex_attention import BlockMask

    queries, keys = (bucket_length(length) for length in layout.shape[1:])
    lists = layout.tile_lists(queries, keys)
    # We have the lists of both directions. BlockMask.from_kv_blocks would sort the first to make the second.
    block_mask = BlockMask(
        (queries, keys),
        lists.q_partial.counts, lists.q_partial.indices, lists.q_full.counts, lists.q_full.indices,
        lists.k_partial.counts, lists.k_partial.indices, lists.k_full.counts, lists.k_full.indices,
        (lists.query_size, lists.key_size),
        _mask_mod(layout, queries, keys),
    )  # fmt: skip
    return FlexPlan(block_mask, queries, keys)


def _mask_mod(layout: AttentionLayout, queries: int, keys: int) -> Any:
    """The visibility rule as a function of single indices, which FlexAttention compiles into its kernels."""
    r = pad_labels(layout.r, queries)
    if layout.index is None:

        def in_order(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return (k <= q) & (r[b, k] <= r[b, q])

        return in_order
    index = pad_labels(layout.index, queries)
    key_r = r if layout.key_r is None else pad_labels(layout.key_r, keys)
    key_index = index if layout.key_index is None else pad_labels(layout.key_index, keys)

    def placed(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (key_index[b, k] <= index[b, q]) & (key_r[b, k] <= r[b, q])

    return placed


@functools.cache
def _compiled() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    limit = torch._dynamo.config.recompile_limit
    torch._dynamo.config.recompile_limit = max(limit, MAX_SHAPES)
    # Without fullgraph, running out of variants would silently fall back to attention by explicit score matrices.
    return torch.compile(flex_attention, dynamic=False, fullgraph=True)


def flex_attention(q: Tensor, k: Tensor, v: Tensor, plan: FlexPlan, softmax_scale: float | None = None) -> Tensor:
    """Same contract as `multiverse_attention_reference`, with a plan instead of a mask."""
    num_queries = q.shape[2]
    q, k, v = (_padded(x, length) for x, length in ((q, plan.queries), (k, plan.keys), (v, plan.keys)))
    grouped = q.shape[1] != k.shape[1]
    out: Tensor = _compiled()(q, k, v, block_mask=plan.block_mask, scale=softmax_scale, enable_gqa=grouped)
    return out[:, :, :num_queries]


def _padded(x: Tensor, length: int) -> Tensor:
    """x [b, h, s, d], zeros appended up to `length` tokens."""
    return x if x.shape[2] == length else F.pad(x, (0, 0, 0, length - x.shape[2]))
