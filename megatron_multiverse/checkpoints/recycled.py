"""Memory for large tensors that is used again.

A conversion holds one or two tensors at a time, but all of the model goes through them. Fresh memory for each would
cost more than reading it: the system clears every page, and on a virtual machine first has to ask the host for it.
"""

from __future__ import annotations

import math
import mmap
import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

_LARGE = 16 << 20  # smaller ones malloc keeps by itself
_CPU = torch.device("cpu")

_lock = threading.RLock()  # a finalizer may run while this thread is in here
_free: list[mmap.mmap] = []
_users = 0


@contextmanager
def recycling() -> Iterator[None]:
    """Within this block memory of large tensors is kept for the next ones; without it `empty` is `torch.empty`."""
    global _users
    with _lock:
        _users += 1
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if not _users:
                _free.clear()


def is_recycling() -> bool:
    """Whether a `recycling` block is open."""
    return bool(_users)


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device = _CPU) -> Tensor:
    """A tensor with undefined content; on the CPU in the memory of one that is gone, if there is one large enough."""
    size = math.prod(shape) * dtype.itemsize
    if size < _LARGE or not _users or device != _CPU:
        return torch.empty(tuple(shape), dtype=dtype, device=device)
    block = _take(size)
    array = np.frombuffer(block, dtype=np.uint8)
    # The tensor and its views keep this array, so it goes with the last of them.
    weakref.finalize(array, _give_back, block).atexit = False
    return torch.from_numpy(array)[:size].view(dtype).view(tuple(shape))


def contiguous(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """The tensor row by row and in a dtype: itself if it is so already."""
    dtype = dtype or tensor.dtype
    return tensor if tensor.is_contiguous() and tensor.dtype == dtype else empty(tensor.shape, dtype).copy_(tensor)


def _take(size: int) -> mmap.mmap:
    with _lock:
        fitting = [block for block in _free if len(block) >= size]
        if fitting:
            block = min(fitting, key=len)
            _free.remove(block)
            return block
        _free.clear()  # all of them are too small
    block = mmap.mmap(-1, size)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        block.madvise(mmap.MADV_HUGEPAGE)
    return block


def _give_back(block: mmap.mmap) -> None:
    with _lock:
        if _users:
            _free.append(block)
