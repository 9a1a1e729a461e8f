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
from .pieces import Work, most_cut, most_parts, most_sharers
from .prompt import Prompt, attend_prompt
from .reference import RowGroup, attend_groups, group_rows, tree_decode_reference
from .successive import SuccessiveWork
from .work import divide_work

tree_decode = tree_decode_reference

Attention = Callable[[Tensor, Tensor, Tensor, float], Tensor]
"""(query, keys, values, softmax scale) -> what the new tokens of a step attend to."""

LONGEST_LISTED = 64
"""Tokens of a row beyond which it is a prompt, whose keys are better read once than once per tile of query heads."""


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
        long = np.diff(borders) > LONGEST_LISTED
        listed = query.is_cuda and (query.dtype == torch.float32 or query.dtype.itemsize == 2)
        if not listed or (long.any() and query.dtype.itemsize != 2):
            return Rectangles(group_rows(pages, lengths, borders, page_size, kv_heads, keys.device))
        prompts = [
            Prompt.upload(
                pages[row], int(lengths[row]), int(borders[row]), int(borders[row + 1]), page_size, query.device
            )
            for row in np.flatnonzero(long)
        ]
        if long.all():
            return Mixed(prompts, None, None)
        counts = np.diff(borders)
        work = divide_work(
            pages[~long],
            lengths[~long],
            np.concatenate(([0], np.cumsum(counts[~long]))),
            page_size=page_size,
            kv_heads=kv_heads,
            processors=processors(query.device),
            slots=most_parts(int(counts[~long].sum())),
            sharers=most_sharers(query.shape[1], kv_heads),
        )
        device_work = DeviceWork.upload(work, query.device)
        if not prompts:
            return device_work
        tokens = torch.from_numpy(np.flatnonzero(np.repeat(~long, counts))).to(query.device)
        return Mixed(prompts, device_work, tokens)


@dataclass(frozen=True)
class Rectangles:
    """Rows padded to rectangles, for torch's attention; see `group_rows`."""

    groups: Sequence[RowGroup]

    def __call__(self, query: Tensor, keys: Tensor, values: Tensor, softmax_scale: float) -> Tensor:
        """See `TreeDecode`."""
        return attend_groups(query, keys, values, self.groups, softmax_scale)


@dataclass(frozen=True)
class Mixed:
    """Prompts one after the other, all other rows by a list of work."""

    prompts: Sequence[Prompt]
    work: DeviceWork | None
    tokens: Tensor | None
    """int64, the tokens that `work` has."""

    def __call__(self, query: Tensor, keys: Tensor, values: Tensor, softmax_scale: float) -> Tensor:
        """See `TreeDecode`."""
        out = torch.empty_like(query)
        if self.work is not None and self.tokens is not None:
            out[self.tokens] = self.work(query[self.tokens], keys, values, softmax_scale)
        for prompt in self.prompts:
            mine = slice(prompt.begin, prompt.end)
            out[mine] = attend_prompt(query[mine], keys, values, prompt, softmax_scale)
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
        slots: int,
    ) -> None:
        self.pages, self.items, self.tokens, self.limits = pages, items, tokens, limits
        self.tails, self.counts, self.slots = tails, counts, slots

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
            work.slots,
        )

    def __call__(self, query: Tensor, keys: Tensor, values: Tensor, softmax_scale: float) -> Tensor:
        """See `TreeDecode`."""
        from .triton_decode import tree_decode_triton

        return tree_decode_triton(
            query, keys, values, self.pages, self.items, self.tokens, self.limits, self.tails, self.counts,
            softmax_scale, slots=self.slots,
        )  # fmt: skip


__all__ = [
    "LONGEST_LISTED",
    "Attention",
    "DeviceWork",
    "RowGroup",
    "SuccessiveWork",
    "TreeDecode",
    "Work",
    "divide_work",
    "group_rows",
    "most_cut",
    "most_parts",
    "most_sharers",
    "tree_decode",
    "tree_decode_reference",
]
