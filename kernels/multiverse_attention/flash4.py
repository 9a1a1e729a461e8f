"""FlashAttention 4 backend (flash_attn.cute, package flash-attn-4): its mask_mod and block-sparse lists on Hopper.

Kernels are compiled at the first call of each kind (head width, dtype, grouping), 4 to 8 s; other lengths and
layouts do not compile again. Lengths are padded to whole tiles. What we put into its kernels stands in
flash4_kernels.py; it is tied to one version of the package, any newer one runs without it, on flash4_masks.py alone.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import logging
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .layout import AttentionLayout
from .tiles import TILE, TileList, TileLists, pad_labels, tile_lists, write_order

logger = logging.getLogger(__name__)

PACKAGE = "flash-attn-4"
VERSION = "4.0.0b36"
"""Oldest version known to be right: earlier builds raced in the block-sparse backward pass on sm_90. It is also the
one that flash4_kernels.py was written for."""
HEAD_DIMS = (64, 128)
SHORT_TILE = 80
"""Queries of a tile of our backward pass at d 128: what its registers hold. It takes 64 where tiles are 128 long."""


@dataclass(frozen=True)
class Flash4Plan:
    """What all layers of a microbatch share."""

    mask: Any
    labels: list[Tensor]
    lists: TileLists
    queries: int
    keys: int
    """Lengths in whole tiles."""
    deterministic: bool
    ordered: Tensor | None
    """r [b, s] of tokens in their order."""
    _backward: dict[int, Any] = field(default_factory=dict)

    def backward(self, head_dim: int) -> Any:
        """Lists of the backward pass for heads of this width; made when they are needed, and once."""
        if head_dim not in self._backward:
            self._backward[head_dim] = _backward_lists(self, head_dim)
        return self._backward[head_dim]


@functools.cache
def _missing() -> str | None:
    """What is wrong with the installation, or None."""
    wanted = f"install {PACKAGE}>={VERSION} (pip install 'megatron-multiverse[gpu]')"
    try:
        found = importlib.metadata.version(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        return f"the package {PACKAGE} is not installed: {wanted}"
    if _version_key(found) < _version_key(VERSION):
        return f"the package {PACKAGE} is version {found}: {wanted}"
    for module in ("flash_attn.cute", "cutlass"):
        try:
            missing = importlib.util.find_spec(module) is None
        except ModuleNotFoundError:
            missing = True
        if missing:
            return f"{PACKAGE} {found} is installed but its module {module} is not there: {wanted}"
    return None


def _version_key(version: str) -> tuple[int, ...]:
    """(major, minor, patch, beta) of 4.0.0b36 or 4.1.0; a release counts as a very late beta."""
    release, _, beta = version.split("+")[0].partition("b")
    numbers = [int(part) for part in release.split(".") if part.isdigit()][:3]
    return (*numbers, *([0] * (3 - len(numbers))), int(beta) if beta.isdigit() else 10**6)


def flash4_problem(device_type: str, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why this backend cannot run, or None."""
    if device_type != "cuda":
        return f"FlashAttention 4 needs a CUDA device, got {device_type}"
    capability = torch.cuda.get_device_capability()
    if capability[0] != 9:
        return f"the block-sparse kernels were checked on sm_90 alone, this GPU is sm_{capability[0]}{capability[1]}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"FlashAttention 4 takes bfloat16 and float16, got {dtype}"
    if head_dim not in HEAD_DIMS:
        return f"FlashAttention 4 was checked with head widths {HEAD_DIMS}, got {head_dim}"
    if (problem := _missing()) is None and torch.are_deterministic_algorithms_enabled() and not _ours_fit():
        return f"torch.use_deterministic_algorithms is on, which needs {PACKAGE} {VERSION} exactly"
    return problem


def _ours_fit() -> bool:
    """Whether flash4_kernels.py was written for the version that is installed."""
    return importlib.metadata.version(PACKAGE) == VERSION


@functools.cache
def _masks() -> Any:
    """flash4_masks; flash4_kernels is connected to FlashAttention 4 if it was written for this version.

    It imports FlashAttention 4's internals, so with any other version it is not even imported.
    """
    from . import flash4_masks

    if _ours_fit():
        from . import flash4_kernels

        flash4_kernels.install()
    else:
        found = importlib.metadata.version(PACKAGE)
        logger.warning(
            "flash4 runs slower than it could: flash4_kernels.py is for %s %s, not %s", PACKAGE, VERSION, found
        )
    return flash4_masks


def flash4_plan(layout: AttentionLayout, dtype: torch.dtype) -> Flash4Plan:
    """Mask and tile lists of one microbatch.

    Under torch.use_deterministic_algorithms the plan says so, and its lists carry the order in which dQ is added.

    Raises:
        ValueError: deterministic mode with explicit places.
    """
    deterministic = torch.are_deterministic_algorithms_enabled()
    if deterministic and layout.index is not None:
        raise ValueError(
            "torch.use_deterministic_algorithms is on and the layout has an index: flash4 is deterministic only for "
            "tokens in their order; set attention_backend to flex"
        )
    masks = _masks()
    queries, keys = (-(-length // TILE) * TILE for length in layout.shape[1:])
    lists = layout.tile_lists(queries, keys)
    # a short tile may reach beyond the last whole one
    mask, labels = masks.ordered, [pad_labels(layout.r, queries + SHORT_TILE)]
    if layout.index is not None:
        of_queries = [pad_labels(x, queries) for x in (layout.r, layout.index)]
        of_keys = of_queries
        if layout.key_r is not None and layout.key_index is not None:
            of_keys = [pad_labels(x, keys) for x in (layout.key_r, layout.key_index)]
        mask, labels = masks.placed, [*of_queries, *of_keys]
    return Flash4Plan(mask, labels, lists, queries, keys, deterministic, layout.r if layout.index is None else None)


def _backward_lists(plan: Flash4Plan, head_dim: int) -> Any:
    """For each key tile its query tiles, in the order in which the backward pass takes them."""
    lists = plan.lists
    if plan.deterministic:
        order = dict(zip(("dq_write_order", "dq_write_order_full"), write_order(lists), strict=True))
        return _sparse(lists.k_partial, lists.k_full, TILE, **order, spt=True)
    if head_dim == 128 and plan.ordered is not None and _ours_fit():
        lists = tile_lists(plan.ordered, query_size=SHORT_TILE, length=plan.queries)
    return _sparse(lists.k_partial, lists.k_full, lists.size)


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
        # the query heads of a group in one tile; where they do not fill it evenly their loads cost more than it saves
        pack_gqa=TILE % (q.shape[2] // k.shape[2]) == 0,
        deterministic=plan.deterministic,
        mask_mod=plan.mask,
        aux_tensors=plan.labels,
        block_sparse_tensors=_sparse(plan.lists.q_partial, plan.lists.q_full, TILE),
        block_sparse_tensors_bwd=plan.backward(q.shape[-1]) if trains else None,
    )
    out = out[0] if isinstance(out, tuple) else out
    return out[:, :num_queries].transpose(1, 2)


def _padded(x: Tensor, length: int) -> Tensor:
    """x [b, s, h, d] with zeros behind s up to `length`."""
    return x if x.shape[1] == length else F.pad(x, (0, 0, 0, 0, 0, length - x.shape[1]))
