"""Sums small tensors over the GPUs of one host in one launch: each reads what the others hold, over NVLink."""

from __future__ import annotations

import logging

import torch
from torch import Tensor, distributed

logger = logging.getLogger(__name__)

MOST_BYTES = 1 << 19
"""Of one tensor. With more, every GPU reading all of it takes longer than NCCL's ring, which reads each part once."""


class SymmetricSum:
    """Sums over a process group by PyTorch's symmetric memory; several times as fast as NCCL for the few rows of a
    decode step, and a CUDA graph can hold it. All ranks add in the order of ranks, so their results are equal bit by
    bit.

    Args:
        group: all ranks call this together, and every sum too.
        dtype: of the tensors, bfloat16 or float32.
        device: this rank's GPU.

    Raises:
        RuntimeError: the GPUs cannot read each other's memory.
    """

    def __init__(self, group: distributed.ProcessGroup, dtype: torch.dtype, device: torch.device) -> None:
        # Imported here: a module of torch that is still called experimental, and of use on GPUs alone.
        import torch.distributed._symmetric_memory as symmetric_memory

        self.group_name = group.group_name
        self.buffer = symmetric_memory.empty(MOST_BYTES // dtype.itemsize, dtype=dtype, device=device)
        symmetric_memory.rendezvous(self.buffer, group)

    @classmethod
    def where_possible(
        cls, group: distributed.ProcessGroup, dtype: torch.dtype, device: torch.device
    ) -> SymmetricSum | None:
        """One of these, or None on all ranks where some rank cannot have it."""
        made: SymmetricSum | None = None
        if dtype in (torch.bfloat16, torch.float32):
            try:
                made = cls(group, dtype, device)
            except RuntimeError as error:
                logger.info("sums over tensor parallel ranks go through NCCL, GPUs do not reach each other: %s", error)
        able = torch.tensor([made is not None], dtype=torch.int32, device=device)
        distributed.all_reduce(able, distributed.ReduceOp.MIN, group=group)
        return made if able.item() else None

    def takes(self, x: Tensor) -> bool:
        """Whether `x` is small enough, of the right kind, and lies where 16 bytes at a time can be read."""
        fits = x.nbytes <= MOST_BYTES and x.nbytes % 16 == 0 and x.data_ptr() % 16 == 0
        return fits and x.dtype == self.buffer.dtype and x.is_contiguous()

    def __call__(self, x: Tensor) -> Tensor:
        """The sum of all ranks' x, a tensor of its own."""
        summed: Tensor = torch.ops.symm_mem.one_shot_all_reduce_copy(
            self.buffer[: x.numel()], x.view(-1), "sum", self.group_name
        )
        return summed.view(x.shape)
