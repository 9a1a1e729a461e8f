"""Memory of the host that a checkpoint is copied to, kept from one checkpoint to the next.

New memory costs more than the copy: the kernel clears its pages at about 2 GB/s, and CUDA copies into pages that are
not pinned, or pins them, not much faster. Kept memory is pinned once, by the first checkpoint, and takes later ones at
the speed of the bus. It is shared with forked processes, so that a fork copies neither its page tables nor what is
written to it meanwhile. A rank keeps as much as the tensors take that it copied.
"""

from __future__ import annotations

import bisect
import contextlib
import logging
import mmap
import os
import weakref
from collections import Counter, defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

_PORTABLE = 1
"""cudaHostRegisterPortable: pinned for every GPU of the process."""
_SHARED = mmap.MAP_SHARED | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_POPULATE", 0)
"""With pages from the start, so that what CUDA pins are those that other processes see."""


class HostMemory:
    """Tensors on the host that stay as they are until the next `reuse`; forked processes read them, too."""

    def __init__(self) -> None:
        self._blocks: defaultdict[int, list[Tensor]] = defaultdict(list)
        self._taken: Counter[int] = Counter()
        self._places: list[tuple[int, int]] = []
        self._pinned: list[int] = []
        self._can_pin = True
        self._copies_run = False
        weakref.finalize(self, _unpin, self._pinned, os.getpid()).atexit = False

    @property
    def size(self) -> int:
        """Bytes that are kept."""
        return sum(end - start for start, end in self._places)

    def reuse(self) -> None:
        """Give the tensors of the checkpoint before up: it is written, or its writers are dead."""
        self._taken.clear()

    def empty(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """A tensor to copy something to, in a storage of its own size.

        Args:
            shape: of the tensor.
            dtype: of the tensor.
            device: where the copy comes from; of a GPU, the memory is pinned.
        """
        count = torch.Size(shape).numel()
        if count == 0:
            return torch.empty(shape, dtype=dtype)
        size = count * dtype.itemsize
        blocks, number = self._blocks[size], self._taken[size]
        if number == len(blocks):
            blocks.append(self._new(size, device))
        self._taken[size] += 1
        return blocks[number].view(dtype).view(shape)

    def copy(self, tensor: Tensor) -> Tensor:
        """A copy of the tensor, complete after `wait`. It runs in the order of the tensor's stream."""
        found = self.empty(tensor.shape, tensor.dtype, tensor.device)
        self.fill(found, tensor.detach())
        return found

    def fill(self, found: Tensor, source: Tensor) -> None:
        """Begin to copy to a tensor of `empty`, or a part of it; see `copy`."""
        found.copy_(source, non_blocking=True)
        self._copies_run |= source.is_cuda

    def wait(self) -> None:
        """Wait until all copies are complete."""
        if self._copies_run:
            torch.cuda.synchronize()
        self._copies_run = False

    def holds(self, tensor: Tensor) -> bool:
        """Whether a tensor lies in this memory."""
        place = tensor.data_ptr()
        number = bisect.bisect_right(self._places, (place, 1 << 64)) - 1
        return number >= 0 and place < self._places[number][1]

    def _new(self, size: int, device: torch.device) -> Tensor:
        mapped = mmap.mmap(-1, size, flags=_SHARED)
        block = torch.frombuffer(mapped, dtype=torch.uint8)  # which keeps the mapping alive
        start = block.data_ptr()
        bisect.insort(self._places, (start, start + size))
        if device.type == "cuda" and self._can_pin:
            self._pin(start, size)
            if hasattr(mmap, "MADV_DOFORK"):  # drivers may keep what they pin from forked processes, as ROCm's does
                mapped.madvise(mmap.MADV_DOFORK)
        return block

    def _pin(self, start: int, size: int) -> None:
        whole = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
        error = int(torch.cuda.cudart().cudaHostRegister(start, whole, _PORTABLE))  # type: ignore[no-untyped-call]
        if error == 0:
            self._pinned.append(start)
            return
        self._can_pin = False
        logger.warning(
            "host memory for checkpoints cannot be pinned (CUDA error %d for %d bytes): copies from the GPU are right, "
            "but several times slower; see that the host and the limits of its containers leave so much memory",
            error,
            size,
        )
        with contextlib.suppress(RuntimeError):  # CUDA tells the error once more to the next kernel that is launched
            torch.zeros(1, device="cuda")


def _unpin(pinned: list[int], owner: int) -> None:
    """CUDA must not think that memory is pinned which is given back; it works in the process that pinned it alone."""
    if pinned and os.getpid() == owner:
        with contextlib.suppress(RuntimeError):  # of what ended the run; nothing is copied any more
            torch.cuda.synchronize()
        for start in pinned:
            torch.cuda.cudart().cudaHostUnregister(start)  # type: ignore[no-untyped-call]
        pinned.clear()
