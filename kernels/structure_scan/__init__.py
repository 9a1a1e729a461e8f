"""From token ids to positions, visibility labels and tile lists, once per microbatch and without leaving the GPU.

`structure_scan` chooses: Triton kernels for tensors on a GPU, the reference for all others. Importing this needs torch
alone; Triton is imported when a kernel runs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_multiverse.structure import TAGS

from ..multiverse_attention.tiles import MAX_TILES, TILE
from .reference import structure_scan_reference
from .scan import StructureScan

MAX_TOKENS = MAX_TILES * TILE
"""Tokens of a row."""


def structure_scan(ids: Tensor, documents: Tensor, tag_ids: Tensor) -> StructureScan:
    """Find the structure of packed documents and say where their tokens stand.

    Args:
        ids: int32 or int64 [b, s] token ids, any values.
        documents: int32 or int64 [b, D, 2], per document its start and where its response starts, in text order; a
            document ends where the next one starts, the last one at s. Unused rows are (s, s). Tags before the start
            of the response mean nothing. Any numbers are accepted: starts are clamped to [0, s], each is at least as
            large as the one before it, and the first document starts at 0.
        tag_ids: int32 or int64 [12], the ids of the tags in the order of `structure.TAGS`.

    Returns:
        Positions, labels and tile lists. A document whose tags break the grammar, or whose blocks nest deeper than
        `structure.MAX_DEPTH`, is laid out as plain causal text and flagged. On CUDA nothing waits for the device, and
        shapes depend on b, s and D alone, so a call can be captured in a CUDA graph.

    Raises:
        ValueError: shapes, dtypes or devices do not fit.
    """
    _check(ids, documents, tag_ids)
    if ids.is_cuda:
        from .triton_scan import structure_scan_triton

        ids = ids if ids.stride(1) == 1 else ids.contiguous()
        return structure_scan_triton(ids, narrow(documents, ids.shape[1]), tag_ids.contiguous())
    return structure_scan_reference(ids, documents, tag_ids)


def narrow(documents: Tensor, num_tokens: int) -> Tensor:
    """documents as contiguous int32. int64 is clamped to [0, num_tokens] first, so that the cut to int32 changes no
    value; the clamping does no harm, since either type is read that way."""
    if documents.dtype == torch.int64:
        documents = documents.clamp(0, num_tokens)
    return documents.to(torch.int32).contiguous()


def _check(ids: Tensor, documents: Tensor, tag_ids: Tensor) -> None:
    for name, tensor, dims in (("ids", ids, 2), ("documents", documents, 3), ("tag_ids", tag_ids, 1)):
        if tensor.dim() != dims or tensor.dtype not in (torch.int32, torch.int64) or tensor.device != ids.device:
            raise ValueError(
                f"{name} must be an int32 or int64 tensor of {dims} dimensions on {ids.device}, "
                f"got {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}"
            )
    if not 1 <= ids.shape[1] <= MAX_TOKENS:
        raise ValueError(f"ids must have 1 to {MAX_TOKENS} tokens per row, got {ids.shape[1]}")
    if documents.shape[0] != ids.shape[0] or documents.shape[1] < 1 or documents.shape[2] != 2:
        raise ValueError(f"documents must be [{ids.shape[0]}, D >= 1, 2] like ids, got {tuple(documents.shape)}")
    if tag_ids.shape[0] != len(TAGS):
        raise ValueError(f"tag_ids must hold {len(TAGS)} ids, got {tag_ids.shape[0]}")


__all__ = ["StructureScan", "structure_scan", "structure_scan_reference"]
