"""Attention of a long run of new tokens of one row: a prompt, or a chunk of one, after what the row has seen before."""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

from ..multiverse_attention.flash4 import flash4_causal, flash4_problem
from ..multiverse_attention.layout import AttentionCase

MANY_KEYS = 4096
"""Beyond them FlashAttention 4 takes half the time of torch's kernel; with fewer, calling it takes longer than that."""
TORCH_KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
"""Not cuDNN, which torch would take on Hopper: for every length that it has not seen it makes a plan, which takes 37 ms
(an H200, torch 2.11), and prompts have all lengths."""


class Prompt(NamedTuple):
    """A row of a step with many new tokens."""

    begin: int
    """Its first new token."""
    end: int
    """After its last one."""
    slots: Tensor
    """int64 [k], slots of all the keys that the last token sees, in order."""

    @classmethod
    def upload(
        cls, pages: npt.NDArray[np.int32], length: int, begin: int, end: int, page_size: int, device: torch.device
    ) -> Prompt:
        """The tokens [begin, end) of a step, the last of the `length` that stand in `pages`."""
        slots = (pages[: -(-length // page_size), None].astype(np.int64) * page_size + np.arange(page_size)).reshape(-1)
        return cls(begin, end, torch.from_numpy(slots[:length]).to(device))


def attend_prompt(query: Tensor, keys: Tensor, values: Tensor, prompt: Prompt, softmax_scale: float) -> Tensor:
    """Causal attention of a prompt over its keys, by torch's flash attention, or FlashAttention 4 for many keys.

    Args:
        query: [q, heads, dim], of the prompt's tokens.
        keys: [pages, page size, kv heads, dim].
        values: same shape as `keys`.
        prompt: the row.
        softmax_scale: factor on the scores.

    Returns:
        [q, heads, dim].
    """
    # Reading page tables would save little: copying a row's keys is nothing beside looking at them q times.
    row_keys, row_values = (x.flatten(0, 1).index_select(0, prompt.slots) for x in (keys, values))
    if len(prompt.slots) > MANY_KEYS and _has_flash4(query.device.type, query.dtype, query.shape[-1]):
        return flash4_causal(query, row_keys, row_values, softmax_scale)
    with sdpa_kernel(TORCH_KERNELS):
        out = F.scaled_dot_product_attention(
            query.transpose(0, 1)[None], row_keys.transpose(0, 1)[None], row_values.transpose(0, 1)[None],
            attn_mask=causal_lower_right(len(query), len(prompt.slots)), scale=softmax_scale, enable_gqa=True,
        )  # fmt: skip
    return out[0].transpose(0, 1)


@functools.cache
def _has_flash4(device_type: str, dtype: torch.dtype, head_dim: int) -> bool:
    return flash4_problem(AttentionCase(device_type, dtype, head_dim)) is None
