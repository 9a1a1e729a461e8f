"""Attention of rows that bring many new tokens, prompts or chunks of them, after what they have seen before.

All of a step are one call of FlashAttention 2, which comes with torch: their keys are copied side by side, and every
run of `SEGMENT` queries looks at a stretch of them. So the call has as many programs as there is work for, and the
lengths stand in tensors, which a CUDA graph can replay with others. Beyond `MANY_KEYS` FlashAttention 4 takes one row
after the other where it is installed.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..multiverse_attention.flash4 import flash4_causal, flash4_problem
from ..multiverse_attention.layout import AttentionCase
from .pieces import Int32s, counted

LONGEST_LISTED = 64
"""Tokens of a row beyond which it is a prompt, whose keys are better read once than once per tile of query heads."""
SEGMENT = 128
"""Most queries of a segment: as many as one program of FlashAttention 2 has with heads of up to 128 numbers."""
MANY_KEYS = 4096
"""Beyond them FlashAttention 4 takes half the time of version 2; with fewer, calling it takes longer than that."""


def prompt_rows(borders: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    """[rows], which rows of a step are prompts: those of more than `LONGEST_LISTED` tokens, and short ones after them.

    Args:
        borders: [rows + 1], row i brings the tokens [borders[i], borders[i + 1]).
    """
    counts = np.diff(borders)
    long = counts > LONGEST_LISTED
    return long | (np.maximum.accumulate(long) & (counts > 1))


class Segments(NamedTuple):
    """Runs of queries, each with the stretch of keys that its last query sees; `cut_segments` makes them."""

    borders: Int32s
    """[s + 1], segment i has the tokens [borders[i], borders[i + 1]) of the step, no more than `SEGMENT` if it sees
    keys."""
    begins: Int32s
    """[s + 1], where among `slots` the keys of its row begin; the last number has no meaning."""
    seen: Int32s
    """[s], keys that its last query sees; 0 for tokens whose attention is computed in another way."""
    slots: Int32s
    """[k], slots of the keys of all rows, one row after the other."""


class DeviceSegments(NamedTuple):
    """`Segments` on the GPU, int32."""

    borders: Tensor
    begins: Tensor
    seen: Tensor
    slots: Tensor

    @classmethod
    def upload(cls, segments: Segments, device: torch.device) -> DeviceSegments:
        """Bring them to the GPU."""
        return cls(*(torch.from_numpy(array).to(device) for array in segments))


def cut_segments(
    pages: Int32s,
    lengths: npt.NDArray[np.int32],
    borders: npt.NDArray[np.int64],
    rows: npt.NDArray[np.bool_],
    page_size: int,
) -> Segments:
    """The segments of some rows of a step; see `TreeDecode` for the first three arguments.

    Args:
        rows: [rows], which ones; at least one.
        page_size: keys per page.
    """
    counts = np.diff(borders)
    chosen = np.flatnonzero(rows)
    first = chosen[0]
    # FlashAttention numbers queries without gaps. So what stands between two rows has a segment, which sees nothing.
    parts = np.where(rows, -(-counts // SEGMENT), 1)[first : chosen[-1] + 1]
    owner, index = counted(parts)
    owner += first
    ends = np.minimum(borders[owner] + (index + 1) * SEGMENT, borders[owner + 1])
    ends = np.where(rows[owner], ends, borders[owner + 1])
    seen = np.where(rows[owner], lengths[owner] - (borders[owner + 1] - ends), 0)
    all_keys = np.where(rows, lengths, 0)
    begins = (np.cumsum(all_keys) - all_keys)[owner]
    row, key = counted(lengths[chosen].astype(np.int64))
    slots = pages[chosen[row], key // page_size].astype(np.int32) * np.int32(page_size) + (key % page_size)
    return Segments(
        np.concatenate((borders[first : first + 1], ends)).astype(np.int32),
        np.append(begins, 0).astype(np.int32),
        seen.astype(np.int32),
        slots.astype(np.int32),
    )


def attend_segments(
    query: Tensor, keys: Tensor, values: Tensor, segments: DeviceSegments, softmax_scale: float
) -> Tensor:
    """Causal attention of segments over their keys.

    Args:
        query: [tokens, heads, dim], of the step; see `takes_segments`.
        keys: [pages, page size, kv heads, dim].
        values: same shape as `keys`.
        segments: which queries see which keys.
        softmax_scale: factor on the scores.

    Returns:
        [tokens, heads, dim]. What stands there for tokens without keys has no meaning.
    """
    # Reading page tables would save little: copying keys is nothing beside looking at them many times.
    row_keys, row_values = (x.flatten(0, 1).index_select(0, segments.slots) for x in (keys, values))
    # torch.nn.attention.varlen calls the same, but in torch 2.11 without `seqused_k`. `begins` is not cumulative, since
    # segments of a row look at the same keys.
    out: Tensor = torch.ops.aten._flash_attention_forward(
        query, row_keys, row_values, segments.borders, segments.begins, SEGMENT, len(segments.slots), 0.0, True, False,
        scale=softmax_scale, seqused_k=segments.seen,
    )[0]  # fmt: skip
    return out


class FarPrompt(NamedTuple):
    """A prompt that FlashAttention 4 takes, on the device."""

    begin: int
    """Its first new token."""
    end: int
    """After its last one."""
    slots: Tensor
    """int32 [k], slots of all the keys that the last token sees, in order."""

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, softmax_scale: float) -> Tensor:
        """Causal attention of its tokens, [end - begin, heads, dim]; see `attend_segments` for the arguments."""
        row_keys, row_values = (x.flatten(0, 1).index_select(0, self.slots) for x in (keys, values))
        return flash4_causal(query[self.begin : self.end], row_keys, row_values, softmax_scale)


def takes_segments(dtype: torch.dtype, head_dim: int) -> bool:
    """Whether torch's FlashAttention 2 takes such queries on this GPU."""
    return dtype.itemsize == 2 and head_dim <= 256 and head_dim % 8 == 0 and _has_flash2()


@functools.cache
def _has_flash2() -> bool:
    if not (torch.cuda.is_available() and torch.backends.cuda.is_flash_attention_available()):
        return False
    return torch.cuda.get_device_capability() >= (8, 0)


@functools.cache
def has_flash4(device_type: str, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether FlashAttention 4 is there, and takes such queries."""
    return flash4_problem(AttentionCase(device_type, dtype, head_dim)) is None
