"""Choosing the next token of each row.

The noise is a function, not a state: Gumbel noise for vocabulary entry v is hashed from (key of the branch, index of
the token in the branch, v), the key from (seed, sample, branch path). So a token does not depend on the other rows
of the batch, on how many branches ran at once, or on preemption.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from megatron_multiverse.inference.step.plan import SamplingArrays
from megatron_multiverse.kernels.greedy import greedy, token_logprobs

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as int64: splitmix64's increment


class Sampler(Protocol):
    """Anything that picks one token per row."""

    def __call__(self, logits: Tensor, sampling: SamplingArrays) -> tuple[Tensor, Tensor]:
        """logits [rows, vocab] -> tokens int64 [rows] and their log-probabilities [rows], see `token_logprobs`."""


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift: torch's on int64 keeps the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    """splitmix64's finaliser; int64 multiplication wraps, as it must."""
    x = (x ^ _shift_right(x, 30)) * -4658895280553007687
    x = (x ^ _shift_right(x, 27)) * -7723592293110705685
    return x ^ _shift_right(x, 31)


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


def filter_logits(logits: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """Set to -inf what top-k (0: off) and then top-p (1: off) leave out; ties at the border stay in.

    Args:
        logits: [rows, vocab], divided by the temperature.
        top_k: int64 [rows].
        top_p: float64 [rows].
    """
    ordered = logits.sort(dim=-1, descending=True).values
    vocab = logits.shape[-1]
    rank = torch.arange(vocab, device=logits.device)
    limit = torch.where(top_k > 0, top_k.clamp(max=vocab), vocab)[:, None]
    ordered = ordered.masked_fill(rank >= limit, float("-inf"))
    before = ordered.double().softmax(-1).cumsum(-1).roll(1, -1)
    before[:, 0] = 0.0
    ordered = ordered.masked_fill((before >= top_p[:, None]) & (rank > 0), float("inf"))
    # After the two fills the smallest finite entry of a row is its threshold.
    threshold = ordered.masked_fill(ordered.isinf(), float("inf")).min(-1, keepdim=True).values
    return logits.masked_fill(logits < threshold, float("-inf"))


class DeviceSampling(NamedTuple):
    """`SamplingArrays` on the device, without top-k and top-p."""

    keys: Tensor
    indices: Tensor
    temperature: Tensor

    def draw(self, logits: Tensor, *, noise: bool = True) -> tuple[Tensor, Tensor]:
        """Tokens and log-probabilities as `Sampler` gives them; `noise` false takes every row for greedy."""
        return self._draw(logits, logits.double() / self._divisor()) if noise else greedy(logits)

    def draw_filtered(self, logits: Tensor, top_k: Tensor, top_p: Tensor) -> tuple[Tensor, Tensor]:
        """The same among what top-k and top-p leave."""
        return self._draw(logits, filter_logits(logits.double() / self._divisor(), top_k, top_p))

    def _divisor(self) -> Tensor:
        return self.temperature.clamp(min=1e-6)[:, None]

    def _draw(self, logits: Tensor, scaled: Tensor) -> tuple[Tensor, Tensor]:
        drawn = (scaled + gumbel_noise(self.keys, self.indices, logits.shape[-1])).argmax(-1)
        tokens = torch.where(self.temperature == 0, logits.argmax(-1), drawn)
        return tokens, token_logprobs(logits, tokens)


class CounterSampler:
    """Greedy at temperature 0; else temperature, top-k, top-p and Gumbel-max."""

    def __call__(self, logits: Tensor, sampling: SamplingArrays) -> tuple[Tensor, Tensor]:
        """See Sampler."""

        def column(values: npt.NDArray[np.generic]) -> Tensor:
            return torch.from_numpy(values).to(logits.device)

        if not sampling.temperature.any():
            return greedy(logits)
        there = DeviceSampling(*map(column, (sampling.keys, sampling.indices, sampling.temperature)))
        if (sampling.top_k > 0).any() or (sampling.top_p < 1).any():
            return there.draw_filtered(logits, column(sampling.top_k), column(sampling.top_p))
        return there.draw(logits)


def pack(tokens: Tensor, logprobs: Tensor) -> Tensor:
    """Tokens int64 [rows] and log-probabilities [rows] as int64 [2, rows], which travels to the host in one copy: the
    log-probabilities as the bits of a float64."""
    return torch.stack((tokens, logprobs.double().view(torch.int64)))
