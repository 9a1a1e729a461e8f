"""Tensors straight from and to files, without mapping them: memory stays bounded by the tensor at hand."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_multiverse.checkpoints.names.table import Shape
from megatron_multiverse.checkpoints.recycled import contiguous, empty, is_recycling
from megatron_multiverse.errors import CheckpointError

_PIECE = 16 << 20


@dataclass(frozen=True)
class Location:
    """Where a tensor lies on disk, its elements one after the other."""

    file: Path
    offset: int
    """First byte in the file."""
    dtype: torch.dtype
    shape: Shape


def read_tensor(place: Location, *, name: str, out: Tensor | None = None) -> Tensor:
    """Read a tensor.

    Args:
        place: where it lies.
        name: of the tensor, for messages.
        out: contiguous memory of its dtype and shape to read into, e.g. a part of a larger tensor; default new memory.

    Raises:
        CheckpointError: the file ends before the tensor does.
    """
    file, offset = place.file, place.offset
    tensor = empty(place.shape, place.dtype) if out is None else out
    assert tensor.is_contiguous() and tensor.dtype == place.dtype and tensor.shape == place.shape
    size = tensor.numel() * tensor.element_size()
    if size == 0:
        return tensor
    view = tensor.reshape(-1).view(torch.uint8).numpy().data
    with open(file, "rb", buffering=0) as stream:
        done = 0
        while done < size:
            count = os.preadv(stream.fileno(), [view[done : done + _PIECE]], offset + done)
            if count == 0:
                raise CheckpointError(
                    f"{file}: ends in the middle of tensor {name} (byte {offset + done} of {offset + size}); "
                    "the file is truncated, copy or download it again"
                )
            if is_recycling() and hasattr(os, "posix_fadvise"):
                # A conversion reads each byte once: without this the page cache takes fresh memory for all.
                os.posix_fadvise(stream.fileno(), offset + done, count, os.POSIX_FADV_DONTNEED)
            done += count
    return tensor


def as_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor, row by row, without a copy if it is contiguous."""
    flat = contiguous(tensor.detach()).reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")


def check_range(tensor: Tensor, dtype: torch.dtype, *, file: Path, name: str) -> None:
    """Raise CheckpointError if a value of the tensor is too large for the dtype it is about to get, as many are for
    float16: it would become infinite."""
    if not tensor.numel() or torch.finfo(dtype).max >= torch.finfo(tensor.dtype).max:
        return
    for part in torch.split(tensor.reshape(-1), 1 << 22):
        ends = torch.stack(torch.aminmax(part))
        if bool((torch.isinf(ends.to(dtype)) & torch.isfinite(ends)).any()):
            short = str(dtype).removeprefix("torch.")
            raise CheckpointError(
                f"{file}: tensor {name} has values of {float(ends.abs().max()):.4g}, {short} ends at "
                f"{torch.finfo(dtype).max:.4g} and would make them infinite: choose another --dtype (bf16 has the "
                "range of float32; --allow-non-finite converts it all the same)"
            )


def check_finite(tensor: Tensor, *, file: Path, name: str) -> None:
    """Raise CheckpointError if the tensor holds NaN or infinity.

    A slice with such a value has a sum that is not finite, and summing costs a tenth of testing every element. Only
    where the sum is not finite every element is tested, since a sum of finite values can overflow.
    """
    if not tensor.is_floating_point():
        return
    for part in torch.split(tensor.reshape(-1), 1 << 22):
        total = part.sum() if part.dtype != torch.float16 else part.sum(dtype=torch.float32)
        if not bool(torch.isfinite(total)) and not bool(torch.isfinite(part).all()):
            count = part.numel() - int(torch.isfinite(part).sum())
            raise CheckpointError(
                f"{file}: tensor {name} holds NaN or infinite values ({count} in one stretch); the file is damaged "
                "or the training diverged, use an earlier checkpoint (--allow-non-finite converts it all the same)"
            )
