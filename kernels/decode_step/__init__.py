"""The tokens of a decode step, before its layers and after its draw."""

from __future__ import annotations

import torch
from torch import Tensor

from .reference import Moving, begin_step_reference, end_step_reference, known_ids


def begin_step(
    ids: Tensor,
    sources: Tensor | None,
    last_tokens: Tensor | None,
    positions: Tensor,
    inv_freq: Tensor,
    embedding: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """See `begin_step_reference`; one launch on a GPU."""
    if ids.is_cuda and inv_freq.dtype == torch.float32:
        from .triton_step import begin_step_triton

        return begin_step_triton(ids, sources, last_tokens, positions, inv_freq, embedding)
    return begin_step_reference(ids, sources, last_tokens, positions, inv_freq, embedding)


def end_step(
    drawn: tuple[Tensor, Tensor] | None, last_tokens: Tensor, moving: Moving | None, page_size: int
) -> Tensor | None:
    """See `end_step_reference`; one launch on a GPU."""
    if last_tokens.is_cuda:
        from .triton_step import end_step_triton

        return end_step_triton(drawn, last_tokens, moving, page_size)
    return end_step_reference(drawn, last_tokens, moving, page_size)


__all__ = [
    "Moving",
    "begin_step",
    "begin_step_reference",
    "end_step",
    "end_step_reference",
    "known_ids",
]
