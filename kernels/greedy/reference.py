"""Greedy choice and log-probabilities: the plain version."""

from __future__ import annotations

import torch
from torch import Tensor


def token_logprobs(logits: Tensor, tokens: Tensor) -> Tensor:
    """Log-probability of each row's token under the model's own distribution (temperature 1, nothing filtered).

    Args:
        logits: [rows, vocab].
        tokens: int64 [rows].

    Returns:
        [rows], float32 or wider; not finite where the logits are not.
    """
    wide = logits.float() if logits.dtype.itemsize < 4 else logits
    return -torch.nn.functional.cross_entropy(wide, tokens, reduction="none")


def greedy_reference(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The first of the most likely tokens of each row, and its log-probability.

    Args:
        logits: [rows, vocab].

    Returns:
        Tokens int64 [rows] and `token_logprobs` of them.
    """
    tokens = logits.argmax(-1)
    return tokens, token_logprobs(logits, tokens)
