"""Attention over a paged cache in which branches share the pages of their prefix.

`TreeDecode` is one step's attention, prepared once for all layers: on a GPU by a list of work for the kernels, with
long prompts by flash attention; on a CPU and in float64 by rectangles for torch's attention.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..device import processors
from . import prompt
from .pieces import NO_MOVES, NO_WORK, Moves, Work, most_cut, most_parts, most_sharers, with_sharers
from .prompt import (
    SEGMENT,
    DeviceSegments,
    FarPrompt,
    Segments,
    attend_segments,
    cut_segments,
    prompt_rows,
    takes_segments,
)
from .reference import RowGroup, attend_groups, group_rows, tree_decode_reference
from .successive import SuccessiveWork
from .work import divide_rows, divide_work

tree_decode = tree_decode_reference

Attention = Callable[[Tensor, Tensor, Tensor, float], Tensor]
"""(query, keys, values, softmax scale) -> what the new tokens of a step attend to."""


@dataclass(eq=False)
class TreeDecode:
    """Attention of the new tokens of a step; see `tree_decode_reference` for the arguments."""

    pages: npt.NDArray[np.int32]
    """[rows, p]."""
    lengths: npt.NDArray[np.int32]
    """[rows]."""
    borders: npt.NDArray[np.int64]
    """[rows + 1]."""
    _attend: Attention | None = field(default=None, init=False)

    def __call__(self, query: Tensor, keys: Tensor, values: Tensor, softmax_scale: float) -> Tensor:
        """query [tokens, heads, dim], keys and values [pages, page_size, kv heads, dim] -> [tokens, heads, dim].

        The first call prepares what the other layers use again.
        """
        if self._attend is None:
            self._attend = self._prepare(query, keys)
        return self._attend(query, keys, values, softmax_scale)

    def _prepare(self, query: Tensor, keys: Tensor) -> Attention:
        page_size, kv_heads = keys.shape[1:3]
        pages, lengths, borders = self.pages, self.lengths, self.borders
        prompts = prompt_rows(borders)
        listed = query.is_cuda and (query.dtype == torch.float32 or query.dtype.itemsize == 2)
        if not listed or (prompts.any() and not takes_segments(query.dtype, query.shape[2])):
            return Rectangles(group_rows(pages, lengths, borders, page_size, kv_heads, keys.device))
        work = None
        if not prompts.all():
            work = divide_rows(
                pages,
                lengths,
                borders,
                ~prompts,
                page_size=page_size,
                kv_heads=kv_heads,
                processors=processors(query.device),
                sharers=most_sharers(query.shape[1], kv_heads),
                shares=True,
            )
        device_work = None if work is None else DeviceWork.upload(work, query.device)
        if device_work is not None and not prompts.any():
            return device_work
        far = prompts & (lengths > prompt.MANY_KEYS)
        if not prompt.has_flash4(query.device.type, query.dtype, query.shape[2]):
            far[:] = False
        near = prompts & ~far
        return Mixed(
            self._segments(near, page_size, query.device) if near.any() else None,
            [self._far_prompt(row, page_size, query.device) for row in np.flatnonzero(far).tolist()],
            device_work,
        )

    def _segments(self, rows: npt.NDArray[np.bool_], page_size: int, device: torch.device) -> DeviceSegments:
        cut = cut_segments(self.pages, self.lengths, self.borders, rows, page_size)
        return DeviceSegments.upload(cut, device)

    def _far_prompt(self, row: int, page_size: int, device: torch.device) -> FarPrompt:
        slots = self._segments(np.arange(len(self.lengths)) == row, page_size, device).slots
        return FarPrompt(int(self.borders[row]), int(self.borders[row + 1]), slots)


@dataclass(frozen=True)
class Rectangles:
    """Rows padded to rectangles, for torch's attention; see `group_rows`."""

    groups: Sequence[RowGroup]

    def __call__(self, query: Tensor, keys: Tensor, values: Tensor, softmax_scale: float) -> Tensor:
        """See `TreeDecode`."""
        return attend_groups(query, keys, values, self.groups, softmax_scale)


@dataclass(frozen=True)
class Mixed:
    """Prompts by FlashAttention, all other rows by a list of work."""

    segments: DeviceSegments | None
    far: Sequence[FarPrompt]
    work: DeviceWork | None

    def __call__(self, query: Tensor, keys: Tensor, values: Tensor, softmax_scale: float) -> Tensor:
        """See `TreeDecode`."""
        if self.segments is None:
            out = torch.empty_like(query)
        else:
            out = attend_segments(query, keys, values, self.segments, softmax_scale)
        for far in self.far:
            out[far.begin : far.end] = far.attend(query, keys, values, softmax_scale)
        if self.work is not None:
            end = len(self.work.counts)
            self.work(query[:end], keys, values, softmax_scale, out=out[:end])
        return out


class DeviceWork:
    """A list of work on the GPU, see `pieces.Work`."""

    def __init__(
        self,
        pages: Tensor,
        items: Tensor,
        tokens: Tensor,
        limits: Tensor,
        tails: Tensor,
        counts: Tensor,
        shares: Tensor,
        slots: int,
    ) -> None:
        self.pages, self.items, self.tokens, self.limits = pages, items, tokens, limits
        self.tails, self.counts, self.shares, self.slots = tails, counts, shares, slots

    @classmethod
    def upload(cls, work: Work, device: torch.device) -> DeviceWork:
        """Bring a list to the GPU."""

        def up(array: npt.NDArray[np.int32]) -> Tensor:
            return torch.from_numpy(np.ascontiguousarray(array)).to(device)

        return cls(
            up(work.pages),
            up(work.items),
            up(work.tokens),
            up(work.limits),
            up(work.tails),
            up(work.counts),
            up(work.shares),
            work.slots,
        )

    def __call__(
        self, query: Tensor, keys: Tensor, values: Tensor, softmax_scale: float, *, out: Tensor | None = None
    ) -> Tensor:
        """See `TreeDecode`; into `out`, if it is there, and there only what the list's queries attend to."""
        if len(self.shares):
            from .triton_shares import attend_shares_triton

            return attend_shares_triton(
                query, keys, values, self.pages, self.items, self.tokens, self.counts, self.shares, softmax_scale,
                slots=self.slots, out=out,
            )  # fmt: skip
        from .triton_decode import tree_decode_triton

        return tree_decode_triton(
            query, keys, values, self.pages, self.items, self.tokens, self.limits, self.tails, self.counts,
            softmax_scale, slots=self.slots, out=out,
        )  # fmt: skip


__all__ = [
    "NO_MOVES",
    "NO_WORK",
    "SEGMENT",
    "Attention",
    "DeviceSegments",
    "DeviceWork",
    "Mixed",
    "Moves",
    "RowGroup",
    "Segments",
    "SuccessiveWork",
    "TreeDecode",
    "Work",
    "cut_segments",
    "divide_rows",
    "divide_work",
    "group_rows",
    "most_cut",
    "most_parts",
    "most_sharers",
    "prompt_rows",
    "takes_segments",
    "tree_decode",
    "tree_decode_reference",
    "with_sharers",
]
