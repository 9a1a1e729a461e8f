"""Sum over GPUs, residual and norm in one launch: each GPU writes its rows into the memory of the others.

A program has one row. It stores its part with every peer, then says so by a flag there; then it waits for the peers'
flags in its own memory, and adds up what they left, in the order of ranks, so that all ranks have equal sums.

Each GPU has two sets of places and flags, and sums that follow each other take them in turns. A peer writes into a
place again two sums later; before that it has waited for a flag of the sum between, which this GPU raises only after
everything of the earlier sum is done. So a flag is down again, and its data read, before it is raised anew.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@dataclass(frozen=True, kw_only=True)
class Exchange:
    """Memory that the GPUs of a group have for each other; made alike on all of them, with all flags down.

    Args:
        rank: of this GPU.
        places: [2, ranks, rows, width], written by the others: of each turn and rank, its part.
        flags: int32 [2, ranks, rows], raised by the others.
        place_addresses: int64 [ranks], where each rank's `places` are seen from here.
        flag_addresses: int64 [ranks], likewise.
    """

    rank: int
    places: Tensor
    flags: Tensor
    place_addresses: Tensor
    flag_addresses: Tensor

    @property
    def most_rows(self) -> int:
        """Rows that one sum can have."""
        return self.places.shape[2]


@triton.jit
def _sum_norm_kernel(part, residual, norm_weight, out, normed, places, flags, place_addresses, flag_addresses,
                     turn, width, most_rows, eps, RANK: tl.constexpr, RANKS: tl.constexpr, LANES: tl.constexpr,
                     PDL: tl.constexpr):  # fmt: skip
    """One program per row; `part` to `normed` are [rows, width]."""
    row, lane = tl.program_id(0), tl.arange(0, LANES)
    inside = lane < width
    at = row * width + lane
    scale = tl.load(norm_weight + lane, mask=inside, other=0.0).to(tl.float32)
    if PDL:
        # In this order: the next kernel reads the table of the step before it waits (kv_write/triton_product.py).
        gdc_wait()
        gdc_launch_dependents()
    mine = tl.load(part + at, mask=inside, other=0.0)
    here = (turn * RANKS + RANK) * most_rows + row
    for step in tl.static_range(1, RANKS):
        there = tl.load(place_addresses + (RANK + step) % RANKS).to(tl.pointer_type(places.dtype.element_ty))
        tl.store(there + here * width + lane, mine, mask=inside)
    tl.debug_barrier()  # the stores of all threads come before the flag
    for step in tl.static_range(1, RANKS):
        flag = tl.load(flag_addresses + (RANK + step) % RANKS).to(tl.pointer_type(tl.int32)) + here
        tl.atomic_xchg(flag, 1, sem="release", scope="sys")
    total = tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
    for rank in tl.static_range(RANKS):
        if rank == RANK:
            total += mine.to(tl.float32)
        else:
            slot = (turn * RANKS + rank) * most_rows + row
            while tl.atomic_cas(flags + slot, 1, 0, sem="acquire", scope="sys") != 1:
                pass
            tl.debug_barrier()  # no thread reads before the flag is seen
            # Not from the L1 cache, which knows nothing of what another GPU wrote.
            total += tl.load(places + slot * width + lane, mask=inside, other=0.0, volatile=True).to(tl.float32)
    tl.store(out + at, total.to(out.dtype.element_ty), mask=inside)
    total *= tl.rsqrt(tl.sum(total * total, 0) / width + eps) * scale
    tl.store(normed + at, total.to(normed.dtype.element_ty), mask=inside)


def sum_norm_push(
    part: Tensor, residual: Tensor, norm_weight: Tensor, eps: float, exchange: Exchange, turn: int, *, pdl: bool = True
) -> tuple[Tensor, Tensor]:
    """See `sum_norm_reference`; every rank gives its own part and calls this for every sum.

    Args:
        part: [n, width] of this rank, contiguous, in the dtype of `exchange.places`; n up to `exchange.most_rows`.
        residual: [n, width], contiguous.
        norm_weight: [width].
        eps: of the norm.
        exchange: memory of the group.
        turn: 0 and 1 alternately; a sum of another kind, which all ranks wait for, may come between equal ones.
        pdl: start while the preceding kernel ends; False where there is no GPU.
    """
    rows, width = part.shape
    out, normed = torch.empty_like(residual), torch.empty_like(residual)
    lanes = triton.next_power_of_2(width)
    options = {"launch_pdl": True} if pdl else {}
    _sum_norm_kernel[(rows,)](
        part, residual, norm_weight, out, normed, exchange.places, exchange.flags, exchange.place_addresses,
        exchange.flag_addresses, turn, width, exchange.most_rows, eps, RANK=exchange.rank,
        RANKS=len(exchange.place_addresses), LANES=lanes, PDL=pdl, num_warps=8 if lanes > 1024 else 4, **options,
    )  # fmt: skip
    return out, normed
