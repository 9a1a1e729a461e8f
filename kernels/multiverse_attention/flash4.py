"""FlashAttention 4 backend (flash_attn.cute, package flash-attn-4): its mask_mod and block-sparse lists on Hopper.

A kernel is compiled at the first call of its kind (head width, dtype, grouping), which takes 4 to 8 s; other lengths
and layouts compile nothing again. Lengths are padded to whole tiles. flash4_kernels.py holds the parts of the kernels
that are ours. It reaches into the package's internals, so it needs one exact version.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .choose_tiles import tile_lists
from .layout import AttentionCase, AttentionLayout
from .tiles import TILE, TileList, TileLists, pad_labels, write_order

PACKAGE = "flash-attn-4"
VERSION = "4.0.0b36"
"""The one version that flash4_kernels.py was written for and tested with. Earlier builds have a data race in the
block-sparse backward pass on sm_90."""
HEAD_DIMS = (64, 128)
SHORT_TILE = 80
"""Query tile of the backward pass at head width 128. 80 rows fit into its registers; with lists for tiles of 128 the
kernel would fall back to 64."""


@dataclass(frozen=True)
class Flash4Plan:
    """What all layers of a microbatch share."""

    mask: Any
    labels: list[Tensor]
    lists: TileLists
    queries: int
    keys: int
    """Lengths in whole tiles."""
    case: AttentionCase
    ordered: Tensor | None
    """r [b, s] if queries and keys are the same tokens in their order, else None."""

    @functools.cached_property
    def backward(self) -> Any:
        """Tile lists of the backward pass, made once and only if they are needed."""
        return _backward_lists(self)


@functools.cache
def _missing() -> str | None:
    """What is wrong with the installation, or None."""
    wanted = f"pip install '{PACKAGE}=={VERSION}', or 'megatron-multiverse[gpu]'"
    try:
        found = importlib.metadata.version(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        return f"the package {PACKAGE} is not installed: {wanted}"
    if found != VERSION:
        return f"the package {PACKAGE} is version {found}, and our kernels are for {VERSION}: {wanted}"
    for module in ("flash_attn.cute", "cutlass", "quack"):
        try:
            problem = None if importlib.util.find_spec(module) else "it is not there"
        except Exception as error:  # find_spec imports the parent package, which may be a broken FlashAttention 2
            problem = f"{type(error).__name__}: {error}"
        if problem:
            return f"{PACKAGE} {found} is installed, but not its module {module} ({problem}): {wanted}"
    return None


def flash4_problem(case: AttentionCase) -> str | None:
    """Why this backend cannot run, or None."""
    if case.device_type != "cuda":
        return f"FlashAttention 4 needs a CUDA device, got {case.device_type}"
    capability = torch.cuda.get_device_capability()
    if capability[0] != 9:
        return f"the block-sparse kernels were checked on sm_90 alone, this GPU is sm_{capability[0]}{capability[1]}"
    if case.dtype not in (torch.bfloat16, torch.float16):
        return f"FlashAttention 4 takes bfloat16 and float16, got {case.dtype}"
    if case.head_dim not in HEAD_DIMS:
        return f"FlashAttention 4 was checked with head widths {HEAD_DIMS}, got {case.head_dim}"
    if case.deterministic and case.placed:
        return (
            "torch.use_deterministic_algorithms is on and the layout has an index: flash4 is deterministic only for "
            "tokens in their order"
        )
    return _missing()


@functools.cache
def _kernels() -> Any:
    """flash4_kernels, connected to FlashAttention 4."""
    from . import flash4_kernels

    flash4_kernels.install()
    return flash4_kernels


def flash4_plan(layout: AttentionLayout, case: AttentionCase) -> Flash4Plan:
    """Mask and tile lists of one microbatch."""
    rules = _kernels()
    queries, keys = (-(-length // TILE) * TILE for length in layout.shape[1:])
    lists = layout.tile_lists(queries, keys)
    if layout.index is None:
        # A tile of SHORT_TILE queries may reach beyond the last whole tile.
        labels = [pad_labels(layout.r, queries + SHORT_TILE)]
        return Flash4Plan(rules.ordered, labels, lists, queries, keys, case, layout.r)
    of_queries = [pad_labels(x, queries) for x in (layout.r, layout.index)]
    of_keys = of_queries
    if layout.key_r is not None and layout.key_index is not None:
        of_keys = [pad_labels(x, keys) for x in (layout.key_r, layout.key_index)]
    return Flash4Plan(rules.placed, [*of_queries, *of_keys], lists, queries, keys, case, None)


def _backward_lists(plan: Flash4Plan) -> Any:
    """For each key tile its query tiles. In a deterministic case the order in which dQ is added comes with them."""
    lists = plan.lists
    if plan.case.deterministic:
        order = dict(zip(("dq_write_order", "dq_write_order_full"), write_order(lists), strict=True))
        return _sparse(lists.k_partial, lists.k_full, TILE, **order, spt=True)
    if plan.case.head_dim == 128 and plan.ordered is not None:
        lists = tile_lists(plan.ordered, query_size=SHORT_TILE, length=plan.queries)
    return _sparse(lists.k_partial, lists.k_full, lists.query_size)


def _sparse(partial: TileList, full: TileList, query_size: int, **rest: Any) -> Any:
    """Lists as FlashAttention 4 wants them."""
    from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch

    return BlockSparseTensorsTorch(
        partial.counts, partial.indices, full.counts, full.indices, block_size=(query_size, TILE), **rest
    )


def flash4_attention(q: Tensor, k: Tensor, v: Tensor, plan: Flash4Plan, softmax_scale: float | None = None) -> Tensor:
    """Same contract as `multiverse_attention_reference`, with a plan instead of a mask."""
    from flash_attn.cute import flash_attn_func

    num_queries = q.shape[2]
    trains = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    q, k, v = (_padded(x.transpose(1, 2), length) for x, length in ((q, plan.queries), (k, plan.keys), (v, plan.keys)))
    out = flash_attn_func(
        q,
        k,
        v,
        softmax_scale=softmax_scale,
        # pack_gqa puts the query heads of a group into one tile. Where they do not fill it evenly, loading them costs
        # more than this saves.
        pack_gqa=TILE % (q.shape[2] // k.shape[2]) == 0,
        deterministic=plan.case.deterministic,
        mask_mod=plan.mask,
        aux_tensors=plan.labels,
        block_sparse_tensors=_sparse(plan.lists.q_partial, plan.lists.q_full, TILE),
        block_sparse_tensors_bwd=plan.backward if trains else None,
    )
    out = out[0] if isinstance(out, tuple) else out
    return out[:, :num_queries].transpose(1, 2)


def flash4_causal(q: Tensor, k: Tensor, v: Tensor, softmax_scale: float) -> Tensor:
    """Plain causal attention, without gradients, of the last tokens of a sequence; see `flash4_problem`.

    Args:
        q: [s_q, h, d], the last s_q of s_k tokens.
        k: [s_k, groups, d].
        v: same shape as `k`.
        softmax_scale: factor on the scores.

    Returns:
        [s_q, h, d].
    """
    from flash_attn.cute import flash_attn_func

    packed = TILE % (q.shape[1] // k.shape[1]) == 0  # see flash4_attention
    out = flash_attn_func(q[None], k[None], v[None], softmax_scale=softmax_scale, causal=True, pack_gqa=packed)
    out = out[0] if isinstance(out, tuple) else out
    return out[0]


def _padded(x: Tensor, length: int) -> Tensor:
    """x [b, s, h, d], zeros appended up to `length` tokens."""
    return x if x.shape[1] == length else F.pad(x, (0, 0, 0, 0, 0, length - x.shape[1]))
