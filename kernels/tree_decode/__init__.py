"""Attention over a paged cache in which branches share the pages of their prefix.

`TreeDecode` is one step's attention, prepared once for all layers: on a GPU by a list of work for the kernels, on a
CPU, in float64 and for long prompts by rectangles for torch's attention.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..device import processors
from .reference import RowGroup, attend_groups, group_rows, tree_decode_reference
from .work import Work, divide_work, most_parts

tree_decode = tree_decode_reference

LONGEST_LISTED = 64
"""Tokens of a row beyond which it is a prompt, whose keys are better read once than once per eight tokens."""


class TreeDecode:
    """Attention of the new tokens of a step; see `tree_decode_reference` for the arguments.

    Args:
        pages: int32 [rows, p].
        lengths: int32 [rows].
        borders: int64 [rows + 1].
    """

    def __init__(
        self, pages: npt.NDArray[np.int32], lengths: npt.NDArray[np.int32], borders: npt.NDArray[np.int64]
    ) -> None:
        self._arrays = pages, lengths, borders
        self._groups: Sequence[RowGroup] | None = None
        self._list: DeviceWork | None = None

    def __call__(self, query: Tensor, keys: Tensor, values: Tensor, softmax_scale: float) -> Tensor:
        """query [tokens, heads, dim], keys and values [pages, page_size, kv heads, dim] -> [tokens, heads, dim].

        The first call prepares what the other layers use again.
        """
        if self._groups is None and self._list is None:
            self._prepare(query, keys)
        if self._list is not None:
            return self._list(query, keys, values, softmax_scale)
        assert self._groups is not None
        return attend_groups(query, keys, values, self._groups, softmax_scale)

    def _prepare(self, query: Tensor, keys: Tensor) -> None:
        page_size, kv_heads = keys.shape[1:3]
        pages, lengths, borders = self._arrays
        if query.is_cuda and query.dtype != torch.float64 and int(np.diff(borders).max()) <= LONGEST_LISTED:
            work = divide_work(
                pages,
                lengths,
                borders,
                page_size=page_size,
                kv_heads=kv_heads,
                processors=processors(query.device),
                slots=most_parts(len(query)),
            )
            self._list = DeviceWork.upload(pages, work, query.device)
        else:
            self._groups = group_rows(pages, lengths, borders, page_size, kv_heads, keys.device)


class DeviceWork:
    """A list of work on the GPU, see `work.Work`; `pages` is the flat page table."""

    def __init__(
        self, pages: Tensor, items: Tensor, tokens: Tensor, limits: Tensor, counts: Tensor, slots: int
    ) -> None:
        self.pages, self.items, self.tokens, self.limits = pages, items, tokens, limits
        self.counts, self.slots = counts, slots

    @classmethod
    def upload(cls, pages: npt.NDArray[np.int32], work: Work, device: torch.device) -> DeviceWork:
        """Bring a list to the GPU."""

        def up(array: npt.NDArray[np.int32]) -> Tensor:
            return torch.from_numpy(np.ascontiguousarray(array)).to(device)

        return cls(up(pages.reshape(-1)), up(work.items), up(work.tokens), up(work.limits), up(work.counts), work.slots)

    def __call__(self, query: Tensor, keys: Tensor, values: Tensor, softmax_scale: float) -> Tensor:
        """See `TreeDecode`."""
        from .triton_decode import tree_decode_triton

        return tree_decode_triton(
            query, keys, values, self.pages, self.items, self.tokens, self.limits, self.counts, softmax_scale,
            slots=self.slots,
        )  # fmt: skip


__all__ = [
    "DeviceWork",
    "RowGroup",
    "TreeDecode",
    "Work",
    "divide_work",
    "group_rows",
    "most_parts",
    "tree_decode",
    "tree_decode_reference",
]
