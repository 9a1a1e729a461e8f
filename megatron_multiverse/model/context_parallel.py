"""Context parallelism under the Multiverse mask: the ranks of a group share the tokens of each row.

Two ways, both exact for any mask:

- `all_gather`: each rank keeps its queries and gathers the keys and values of all. Tokens travel with label and place,
  so any of them may lie on any rank. They are dealt out so that all ranks have as many tokens and nearly the same
  visible area. (Zig-zag, which does that for a causal mask, does not for this one.)
- `a2a`: each rank has a stretch of tokens, and for attention exchanges them for its share of the heads (Ulysses), which
  is balanced under every mask.

Shapes: s tokens of a row, c ranks, b batch, h query heads and g key/value heads of this rank, d head width.
"""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel.mappings import all_to_all, gather_from_sequence_parallel_region
from torch import Tensor

from megatron_multiverse.kernels.multiverse_attention import AttentionLayout
from megatron_multiverse.kernels.multiverse_attention.tiles import (
    FULL,
    PARTIAL,
    TILE,
    tile_bounds_reference,
    tile_classes,
)
from megatron_multiverse.model.attention import LayoutParams
from megatron_multiverse.model.device import to_device

PARTIAL_COST = 3
"""How many times as long as a wholly visible key tile a partly visible one takes, forward and backward: 3.1 by least
squares over the times of the ranks of packed rows on an H200 (benchmarks/training_balance.py)."""


def split_by_area(r: Tensor, ranks: int) -> Tensor:
    """Deal the tokens of each row out to ranks: as many for each, in chunks, with nearly the same work in attention.

    From the heaviest on (see `chunk_work`) each chunk goes to the rank that has least so far and is not full. Every
    rank computes this for itself, on the host.

    Each rank keeps its chunks in that order, the heaviest first. A GPU takes them up one after the other as its
    multiprocessors become free, and with the heaviest ones last most would wait for a few at the end.

    Args:
        r: int labels [b, s], on the CPU; s is a multiple of `ranks`.
        ranks: c.

    Returns:
        int64 [b, c, s / c], the places of each rank's tokens in their row.
    """
    chunk = math.gcd(r.shape[1] // ranks, TILE)
    dealt = torch.tensor([_deal(row.tolist(), ranks) for row in chunk_work(r, chunk)])
    return (dealt[..., None] * chunk + torch.arange(chunk)).flatten(2)


def chunk_work(r: Tensor, chunk: int) -> Tensor:
    """What attention has to do for each chunk of queries, in key tiles of which all is visible.

    Tiles of which a part is visible count `PARTIAL_COST` times, others are not visited.

    Args:
        r: int labels [b, s], on the CPU.
        chunk: tokens of a chunk; divides s.

    Returns:
        int64 [b, s / chunk].
    """
    classes = tile_classes(tile_bounds_reference(r, size=chunk), tile_bounds_reference(r))
    work: Tensor = (classes == FULL).sum(-1) + PARTIAL_COST * (classes == PARTIAL).sum(-1)
    return work


def _deal(work: list[int], ranks: int) -> list[list[int]]:
    """As many chunks for each rank, with nearly the same work, the heaviest first."""
    most = len(work) // ranks
    open_ranks = [(0, rank) for rank in range(ranks)]  # a heap by the work so far
    dealt: list[list[int]] = [[] for _ in range(ranks)]
    for number in sorted(range(len(work)), key=lambda n: -work[n]):
        load, rank = heapq.heappop(open_ranks)
        dealt[rank].append(number)
        if len(dealt[rank]) < most:
            heapq.heappush(open_ranks, (load + work[number], rank))
    return dealt


@dataclass
class GatheredKeysParams(LayoutParams):
    """Local queries over the keys and values of all ranks of the group."""

    group: Any = field(kw_only=True)
    """The context parallel ranks."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, *, layer_number: int, softmax_scale: float) -> Tensor:
        """See AttentionParams.attend; query [s/c, b, h, d], key and value [s/c, b, g, d]."""
        both = gather_from_sequence_parallel_region(torch.cat([key, value], dim=2), group=self.group)
        keys, values = both.split(key.shape[2], dim=2)
        return super().attend(query, keys, values, layer_number=layer_number, softmax_scale=softmax_scale)


@dataclass
class ExchangedHeadsParams(LayoutParams):
    """All tokens of a row for this rank's share of the heads."""

    group: Any = field(kw_only=True)
    """The context parallel ranks."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, *, layer_number: int, softmax_scale: float) -> Tensor:
        """See AttentionParams.attend; query [s/c, b, h, d], key and value [s/c, b, g, d]."""
        ranks = self.group.size()
        length, rows, _, width = query.shape
        # [s/c, b, c, heads of each rank, d], then the rank that gets them in front
        shares = [x.reshape(length, rows, ranks, -1, width) for x in (query, key, value)]
        sizes = [share.shape[3] for share in shares]
        mixed = all_to_all(self.group, torch.cat(shares, dim=3).permute(2, 0, 1, 3, 4))
        q, k, v = mixed.reshape(ranks * length, rows, sum(sizes), width).split(sizes, dim=2)
        out = super().attend(q, k, v, layer_number=layer_number, softmax_scale=softmax_scale)
        back = all_to_all(self.group, out.view(ranks, length, rows, -1))  # in front: whose heads they are
        merged: Tensor = back.permute(1, 2, 0, 3).reshape(length, rows, -1)
        return merged


def share_tokens(params: LayoutParams, r: Tensor, comm_type: str) -> tuple[LayoutParams, Tensor]:
    """What this context parallel rank attends to, and which tokens of each row are its own.

    Args:
        params: of whole rows.
        r: their labels on the host, by which the tokens are dealt out without waiting for the device.
        comm_type: "all_gather" or "a2a".

    Returns:
        The params for this rank's part, and int64 places [b, s/c] on the device.
    """
    group = parallel_state.get_context_parallel_group()
    ranks, rank = group.size(), group.rank()
    labels = params.layout.r
    if comm_type == "a2a":
        rows, length = labels.shape
        places = torch.arange(length, device=labels.device).view(1, ranks, -1)[:, rank].expand(rows, -1)
        return ExchangedHeadsParams(layout=params.layout, backend=params.backend, group=group), places
    everyone = to_device(split_by_area(r, ranks), labels.device)
    places, key_places = everyone[:, rank], everyone.flatten(1)
    layout = AttentionLayout(
        labels.gather(1, places),
        index=places.int(),
        key_r=labels.gather(1, key_places),
        key_index=key_places.int(),
    )
    return GatheredKeysParams(layout=layout, backend=params.backend, group=group), places
