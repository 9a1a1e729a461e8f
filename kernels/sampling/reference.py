"""Choosing tokens and their log-probabilities: the plain version.

The noise is a function, not a state: Gumbel noise for vocabulary entry v is hashed from (key of the branch, index of
the token in the branch, v). So a token does not depend on the other rows of the batch, on how many branches ran at
once, or on preemption.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

SMALLEST_TEMPERATURE = 1e-6
"""Of a row that is not greedy."""
_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as int64: splitmix64's increment


class Filters(NamedTuple):
    """Which tokens of a row may be drawn: those that min-p leaves, then of them top-k, then of them top-p. Ties at a
    border stay in."""

    top_k: Tensor
    """int64 [rows]; 0 is off."""
    top_p: Tensor
    """float64 [rows], above 0; 1 is off."""
    min_p: Tensor
    """float64 [rows]; 0 is off."""


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


def draw_reference(
    logits: Tensor, keys: Tensor, indices: Tensor, temperature: Tensor, filters: Filters | None = None
) -> tuple[Tensor, Tensor]:
    """A token of each row, drawn from the softmax of its logits over the temperature, of what the filters leave.

    Args:
        logits: [rows, vocab].
        keys: int64 [rows], of the branches.
        indices: int64 [rows], of the tokens in their branches.
        temperature: float64 [rows]; 0 is greedy.
        filters: which tokens may be drawn; None for all.

    Returns:
        Tokens int64 [rows] and `token_logprobs` of them.
    """
    scaled = logits.double() / temperature.clamp(min=SMALLEST_TEMPERATURE)[:, None]
    if filters is not None:
        scaled = filter_logits(scaled, filters)
    drawn = (scaled + gumbel_noise(keys, indices, logits.shape[-1])).argmax(-1)
    tokens = torch.where(temperature == 0, logits.argmax(-1), drawn)
    return tokens, token_logprobs(logits, tokens)


def filter_logits(logits: Tensor, filters: Filters) -> Tensor:
    """Set to -inf what min-p, then top-k, then top-p leave out; ties at the border stay in.

    Args:
        logits: [rows, vocab], divided by the temperature.
        filters: which tokens may be drawn.
    """
    top_k, top_p, min_p = filters
    logits = logits.masked_fill(logits < logits.amax(-1, keepdim=True) + min_p.log()[:, None], float("-inf"))
    ordered = logits.sort(dim=-1, descending=True).values
    vocab = logits.shape[-1]
    rank = torch.arange(vocab, device=logits.device)
    limit = torch.where(top_k > 0, top_k.clamp(max=vocab), vocab)
    smallest = ordered.gather(-1, limit[:, None] - 1)
    ordered = ordered.masked_fill(ordered < smallest, float("-inf"))
    before = ordered.double().softmax(-1).cumsum(-1).roll(1, -1)
    before[:, 0] = 0.0
    kept = ordered.masked_fill((before >= top_p[:, None]) & (rank > 0) | ordered.isneginf(), float("inf"))
    return logits.masked_fill(logits < kept.amin(-1, keepdim=True), float("-inf"))


def gumbel_noise(keys: Tensor, indices: Tensor, vocab_size: int) -> Tensor:
    """Standard Gumbel noise.

    Args:
        keys: int64 [rows].
        indices: int64 [rows], index of the token in its branch.
        vocab_size: number of entries.

    Returns:
        float64 [rows, vocab_size], a function of the arguments alone.
    """
    state = _mix(keys ^ _mix(indices * _GOLDEN))
    counter = torch.arange(1, vocab_size + 1, device=keys.device) * _GOLDEN
    uniform = (_shift_right(_mix(state[:, None] + counter), 11).double() + 0.5) * 2.0**-53
    return -torch.log(-torch.log(uniform))


def _mix(x: Tensor) -> Tensor:
    """splitmix64's finaliser; int64 multiplication wraps, as it must."""
    x = (x ^ _shift_right(x, 30)) * -4658895280553007687
    x = (x ^ _shift_right(x, 27)) * -7723592293110705685
    return x ^ _shift_right(x, 31)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift: torch's on int64 keeps the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def pack_drawn(tokens: Tensor, logprobs: Tensor) -> Tensor:
    """Tokens, int64 [rows], and log-probabilities [rows] as the bits of float64, in one tensor, int64 [2, rows]."""
    return torch.stack((tokens, logprobs.double().view(torch.int64)))
