"""Choosing the next token of each row, as `kernels/sampling` draws it, and what is told about it."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from megatron_multiverse.inference.step.plan import SamplingArrays
from megatron_multiverse.inference.step.shaping import edit_logits, top_logprobs
from megatron_multiverse.kernels.sampling import Filters, draw, greedy, pack_drawn, token_logprobs

_SCORED_AT_ONCE = 64
"""Rows of a wide vocabulary that stand in float32 at once."""


class Sampler(Protocol):
    """Anything that picks one token per row."""

    def __call__(self, logits: Tensor, sampling: SamplingArrays) -> tuple[Tensor, Tensor]:
        """logits [rows, vocab] -> tokens int64 [rows] and their log-probabilities [rows], see `token_logprobs`."""


class DeviceSampling(NamedTuple):
    """`SamplingArrays` on the device, and of `Shaping` the filters."""

    keys: Tensor
    indices: Tensor
    temperature: Tensor
    filters: Filters | None

    def draw(self, logits: Tensor, *, noise: bool = True) -> tuple[Tensor, Tensor]:
        """Tokens and log-probabilities as `Sampler` gives them; `noise` false takes every row for greedy."""
        return draw(logits, *self) if noise else greedy(logits)


class CounterSampler:
    """Greedy at temperature 0; else temperature, min-p, top-k, top-p and Gumbel-max."""

    def __call__(self, logits: Tensor, sampling: SamplingArrays) -> tuple[Tensor, Tensor]:
        """See Sampler."""

        def column(values: npt.NDArray[np.generic]) -> Tensor:
            return torch.from_numpy(values).to(logits.device)

        if not sampling.temperature.any():
            return greedy(logits)
        shaping = sampling.shaping
        filters = None
        if shaping is not None and shaping.has_filters:
            filters = Filters(*map(column, (shaping.top_k, shaping.top_p, shaping.min_p)))
        keys, indices, temperature = map(column, (sampling.keys, sampling.indices, sampling.temperature))
        return draw(logits, keys, indices, temperature, filters)


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
    packed = pack_drawn(tokens, logprobs)
    if top_ids is None or top_logprobs is None:
        return packed
    return torch.cat((packed, top_ids.T, top_logprobs.double().view(torch.int64).T))
