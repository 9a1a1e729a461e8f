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
from megatron_multiverse.inference.step.shaping import edit_logits, filter_logits, top_logprobs
from megatron_multiverse.kernels.greedy import greedy, token_logprobs

_SCORED_AT_ONCE = 64
"""Rows of a wide vocabulary that stand in float32 at once."""
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


class DeviceSampling(NamedTuple):
    """`SamplingArrays` on the device, without what `Shaping` holds."""

    keys: Tensor
    indices: Tensor
    temperature: Tensor

    def draw(self, logits: Tensor, *, noise: bool = True) -> tuple[Tensor, Tensor]:
        """Tokens and log-probabilities as `Sampler` gives them; `noise` false takes every row for greedy."""
        return self._draw(logits, logits.double() / self._divisor()) if noise else greedy(logits)

    def draw_filtered(self, logits: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> tuple[Tensor, Tensor]:
        """The same among what `filter_logits` leaves."""
        return self._draw(logits, filter_logits(logits.double() / self._divisor(), top_k, top_p, min_p))

    def _divisor(self) -> Tensor:
        return self.temperature.clamp(min=1e-6)[:, None]

    def _draw(self, logits: Tensor, scaled: Tensor) -> tuple[Tensor, Tensor]:
        drawn = (scaled + gumbel_noise(self.keys, self.indices, logits.shape[-1])).argmax(-1)
        tokens = torch.where(self.temperature == 0, logits.argmax(-1), drawn)
        return tokens, token_logprobs(logits, tokens)


class CounterSampler:
    """Greedy at temperature 0; else temperature, min-p, top-k, top-p and Gumbel-max."""

    def __call__(self, logits: Tensor, sampling: SamplingArrays) -> tuple[Tensor, Tensor]:
        """See Sampler."""

        def column(values: npt.NDArray[np.generic]) -> Tensor:
            return torch.from_numpy(values).to(logits.device)

        if not sampling.temperature.any():
            return greedy(logits)
        there = DeviceSampling(*map(column, (sampling.keys, sampling.indices, sampling.temperature)))
        shaping = sampling.shaping
        if shaping is not None and ((shaping.top_k > 0) | (shaping.top_p < 1) | (shaping.min_p > 0)).any():
            return there.draw_filtered(logits, *map(column, (shaping.top_k, shaping.top_p, shaping.min_p)))
        return there.draw(logits)


def choose(logits: Tensor, sampling: SamplingArrays, sampler: Sampler, last_tokens: Tensor) -> Tensor:
    """Draw a token for each row, and tell what is asked about it.

    Args:
        logits: [rows, vocab], the model's own; all log-probabilities are theirs.
        sampling: what each row asks.
        sampler: draws from the logits as biases and penalties leave them.
        last_tokens: tokens that the previous step drew.

    Returns:
        See `pack`.
    """
    shaping = sampling.shaping
    if shaping is None:
        return pack(*sampler(logits, sampling))
    edited = edit_logits(logits, shaping, last_tokens)
    tokens, logprobs = sampler(edited, sampling)
    if edited is not logits:
        logprobs = token_logprobs(logits, tokens)
    count = int(shaping.num_logprobs.max(initial=0))
    return pack(tokens, logprobs, *(top_logprobs(logits, count) if count else ()))


def score(logits: Tensor, targets: npt.NDArray[np.int64], count: int) -> Tensor:
    """Log-probabilities of known tokens under the model's own distribution.

    Args:
        logits: [rows, vocab].
        targets: int64 [rows].
        count: most likely tokens to give beside each.

    Returns:
        See `pack`.
    """
    parts = []
    for start in range(0, len(targets), _SCORED_AT_ONCE):
        rows = logits[start : start + _SCORED_AT_ONCE]
        tokens = torch.from_numpy(targets[start : start + _SCORED_AT_ONCE]).to(logits.device)
        parts.append(pack(tokens, token_logprobs(rows, tokens), *(top_logprobs(rows, count) if count else ())))
    return torch.cat(parts, 1)


def pack(tokens: Tensor, logprobs: Tensor, top_ids: Tensor | None = None, top_logprobs: Tensor | None = None) -> Tensor:
    """What a step tells, in one tensor that travels to the host in one copy: int64 [2 + 2n, rows].

    Args:
        tokens: int64 [rows].
        logprobs: [rows]; like `top_logprobs` they are packed as the bits of a float64.
        top_ids: int64 [rows, n].
        top_logprobs: [rows, n].
    """
    packed = torch.stack((tokens, logprobs.double().view(torch.int64)))
    if top_ids is None or top_logprobs is None:
        return packed
    return torch.cat((packed, top_ids.T, top_logprobs.double().view(torch.int64).T))
