"""Sums small tensors over the GPUs of one host in one launch: over NVLink, each in the others' memory.

With residual and norm in the same launch where a norm follows; by PyTorch's one-shot sum elsewhere.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, distributed

from megatron_multiverse.kernels.sum_norm.triton_push import Exchange, sum_norm_push

logger = logging.getLogger(__name__)

MOST_BYTES = 1 << 19
"""Of one tensor. With more, every GPU reading all of it takes longer than NCCL's ring, which reads each part once."""
MOST_ROWS = 128
"""Rows of a sum with a norm, in a CUDA graph or not; steps of more tokens sum and norm apart."""


class SymmetricSum:
    """Sums over a process group by PyTorch's symmetric memory; several times as fast as NCCL for the few rows of a
    decode step, and a CUDA graph can hold it. All ranks add in the order of ranks, so their results are equal bit by
    bit.

    Args:
        group: all ranks call this together, and every sum too.
        dtype: of the tensors, bfloat16 or float32.
        device: this rank's GPU.
        width: of the residual stream.

    Raises:
        RuntimeError: the GPUs cannot read each other's memory.
    """

    def __init__(self, group: distributed.ProcessGroup, dtype: torch.dtype, device: torch.device, width: int) -> None:
        self.group_name = group.group_name
        self.buffer, _ = _shared((MOST_BYTES // dtype.itemsize,), dtype, device, group)
        places, place_addresses = _shared((2, group.size(), MOST_ROWS, width), dtype, device, group)
        flags, flag_addresses = _shared((2, group.size(), MOST_ROWS), torch.int32, device, group)
        flags.zero_()
        self.exchange = Exchange(
            rank=group.rank(),
            places=places,
            flags=flags,
            place_addresses=place_addresses,
            flag_addresses=flag_addresses,
        )

    @classmethod
    def where_possible(
        cls, group: distributed.ProcessGroup, dtype: torch.dtype, device: torch.device, width: int
    ) -> SymmetricSum | None:
        """One of these, or None on all ranks where some rank cannot have it."""
        made: SymmetricSum | None = None
        if dtype in (torch.bfloat16, torch.float32):
            try:
                made = cls(group, dtype, device, width)
            except RuntimeError as error:
                logger.info("sums over tensor parallel ranks go through NCCL, GPUs do not reach each other: %s", error)
        # After this sum all flags are down on all ranks.
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

    def takes_rows(self, rows: int) -> bool:
        """Whether `add_norm` is to take so many rows."""
        return rows <= self.exchange.most_rows

    def add_norm(
        self, part: Tensor, residual: Tensor, norm_weight: Tensor, eps: float, *, turn: int
    ) -> tuple[Tensor, Tensor]:
        """The residual stream with all ranks' parts added, and its norm; see `sum_norm_push`."""
        return sum_norm_push(part, residual, norm_weight, eps, self.exchange, turn)


def _shared(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, group: distributed.ProcessGroup
) -> tuple[Tensor, Tensor]:
    """Memory that all ranks of the group can reach, and int64 [ranks]: where each rank's is seen from this one."""
    # Imported here: a module of torch that is still called experimental, and of use on GPUs alone.
    import torch.distributed._symmetric_memory as symmetric_memory

    mine = symmetric_memory.empty(shape, dtype=dtype, device=device)
    handle: Any = symmetric_memory.rendezvous(mine, group)
    bases = [int(address) for address in handle.buffer_ptrs]
    offset = mine.data_ptr() - bases[group.rank()]  # several tensors may share one piece of memory
    return mine, torch.tensor([base + offset for base in bases], dtype=torch.int64, device=device)
