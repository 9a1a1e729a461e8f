"""The most likely token of each row and its log-probability."""

from __future__ import annotations

import torch
from torch import Tensor

from .reference import greedy_reference, token_logprobs


def greedy(logits: Tensor) -> tuple[Tensor, Tensor]:
    """See `greedy_reference`; two launches on a GPU."""
    if logits.is_cuda and logits.dtype != torch.float64:
        from .triton_greedy import greedy_triton

        return greedy_triton(logits)
    return greedy_reference(logits)


__all__ = ["greedy", "greedy_reference", "token_logprobs"]
