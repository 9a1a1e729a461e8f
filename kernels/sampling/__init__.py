"""The next token of each row, and its log-probability."""

from __future__ import annotations

import torch
from torch import Tensor

from .reference import (
    Filters,
    draw_reference,
    filter_logits,
    greedy_reference,
    gumbel_noise,
    pack_drawn,
    token_logprobs,
)


def greedy(logits: Tensor) -> tuple[Tensor, Tensor]:
    """See `greedy_reference`; two launches on a GPU."""
    if logits.is_cuda and logits.dtype != torch.float64:
        from .triton_greedy import greedy_triton

        return greedy_triton(logits)
    return greedy_reference(logits)


def draw(
    logits: Tensor, keys: Tensor, indices: Tensor, temperature: Tensor, filters: Filters | None = None
) -> tuple[Tensor, Tensor]:
    """See `draw_reference`; two launches on a GPU, with filters, too."""
    if logits.is_cuda and logits.dtype != torch.float64:
        from .triton_draw import draw_triton

        return draw_triton(logits, keys, indices, temperature, filters)
    return draw_reference(logits, keys, indices, temperature, filters)


__all__ = [
    "Filters",
    "draw",
    "draw_reference",
    "filter_logits",
    "greedy",
    "greedy_reference",
    "gumbel_noise",
    "pack_drawn",
    "token_logprobs",
]
