"""Choosing the next token of each row.

The noise is a function, not a state: Gumbel noise for vocabulary entry v is hashed from (key of the branch, index of
the token in the branch, v), the key from (seed, sample, branch path). So a token does not depend on the other rows
of the batch, on how many branches ran at once, or on preemption.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from megatron_multiverse.inference.branch import Branch

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as int64: splitmix64's increment


class Sampler(Protocol):
    """Anything that picks one token per row."""

    def __call__(self, logits: Tensor, branches: Sequence[Branch]) -> Tensor:
        """logits [rows, vocab] of `branches` -> int64 [rows]."""


def branch_key(seed: int, sample: int, path: Sequence[tuple[int, int]]) -> int:
    """Key of a branch as signed 64 bit: `path` lists (block in its parent, path in the block), outermost first."""
    digest = hashlib.blake2b(repr((seed, sample, tuple(path))).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


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


class CounterSampler:
    """Greedy at temperature 0; else temperature, top-k, top-p and Gumbel-max."""

    def __call__(self, logits: Tensor, branches: Sequence[Branch]) -> Tensor:
        """See Sampler."""
        params = [branch.request.params for branch in branches]
        greedy = logits.argmax(-1)
        if all(p.temperature == 0 for p in params):
            return greedy

        def column(values: list[float] | list[int], dtype: type = np.float64) -> Tensor:
            return torch.from_numpy(np.array(values, dtype=dtype)).to(logits.device)

        temperature = column([p.temperature for p in params])
        scaled = logits.double() / temperature.clamp(min=1e-6)[:, None]
        if any(p.top_k > 0 or p.top_p < 1 for p in params):
            top_k = column([p.top_k for p in params], np.int64)
            scaled = filter_logits(scaled, top_k, column([p.top_p for p in params]))
        keys = column([b.key for b in branches], np.int64)
        indices = column([b.num_sampled for b in branches], np.int64)
        drawn = (scaled + gumbel_noise(keys, indices, logits.shape[-1])).argmax(-1)
        return torch.where(temperature == 0, greedy, drawn)
