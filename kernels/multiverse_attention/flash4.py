"""FlashAttention 4 backend (flash_attn.cute, package flash-attn-4): its mask_mod and block-sparse lists on Hopper.

Kernels are compiled at the first call of each kind (head width, dtype, grouping), 4 to 8 s; other lengths and
layouts do not compile again. Lengths are padded to whole tiles.
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

from .tiles import TILE, TileLists, pad_labels, tile_lists

PACKAGE = "flash-attn-4"
VERSION = "4.0.0b36"
"""Oldest version known to be right: earlier builds raced in the block-sparse backward pass on sm_90."""
HEAD_DIMS = (64, 128)


@dataclass(frozen=True)
class Flash4Plan:
    """What all layers of a microbatch share."""

    mask: Any
    labels: list[Tensor]
    forward: Any
    backward: Any
    length: int


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
    if torch.are_deterministic_algorithms_enabled():
        return "its backward pass adds dQ in varying order, and torch.use_deterministic_algorithms is on"
    return _missing()


def flash4_plan(r: Tensor, index: Tensor | None, dtype: torch.dtype, lists: TileLists | None = None) -> Flash4Plan:
    """Mask and tile lists of one microbatch from r [b, s]; `lists` are made here unless given (they must fit)."""
    from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch

    from . import flash4_masks

    length = -(-r.shape[1] // TILE) * TILE
    if lists is None:
        lists = tile_lists(r, index, length=length)
    elif not lists.fit(r, length):
        raise ValueError(f"tile lists of shape {lists.shape} do not fit labels {tuple(r.shape)}: make them for them")

    def sparse(partial: Any, full: Any) -> Any:
        return BlockSparseTensorsTorch(
            partial.counts, partial.indices, full.counts, full.indices, block_size=(lists.size, lists.size)
        )

    return Flash4Plan(
        mask=flash4_masks.ordered if index is None else flash4_masks.permuted,
        labels=[pad_labels(x, length) for x in (r, index) if x is not None],
        forward=sparse(lists.q_partial, lists.q_full),
        backward=sparse(lists.k_partial, lists.k_full),
        length=length,
    )


def flash4_attention(q: Tensor, k: Tensor, v: Tensor, plan: Flash4Plan, softmax_scale: float | None = None) -> Tensor:
    """Same contract as `multiverse_attention_reference`, with a plan instead of a mask."""
    from flash_attn.cute import flash_attn_func

    num_tokens = q.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if plan.length != num_tokens:
        q, k, v = (F.pad(x, (0, 0, 0, 0, 0, plan.length - num_tokens)) for x in (q, k, v))
    out = flash_attn_func(
        q,
        k,
        v,
        softmax_scale=softmax_scale,
        mask_mod=plan.mask,
        aux_tensors=plan.labels,
        block_sparse_tensors=plan.forward,
        block_sparse_tensors_bwd=plan.backward,
    )
    out = out[0] if isinstance(out, tuple) else out
    return out[:, :num_tokens].transpose(1, 2)
