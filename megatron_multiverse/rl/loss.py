"""The policy loss of DAPO (arXiv 2503.14476) over the tokens that the model drew, and what is measured on the way."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from megatron_multiverse.config import PolicyConfig
from megatron_multiverse.kernels.greedy import token_logprobs
from megatron_multiverse.model.device import to_device
from megatron_multiverse.training.microbatches import Microbatch
from megatron_multiverse.training.placement import TokenPlacer

NEAR = 0.01
"""Ratios of new to old probability within 1 +- NEAR count as equal."""


def clipped_objective(ratio: Tensor, advantages: Tensor, clip_low: float, clip_high: float) -> Tensor:
    """What each token gains: the smaller one of ratio x advantage and clipped ratio x advantage."""
    return torch.minimum(ratio * advantages, ratio.clamp(1 - clip_low, 1 + clip_high) * advantages)


class PolicyNumbers(NamedTuple):
    """Of the targets since the numbers were last taken."""

    targets: int
    entropy: float
    """Mean entropy of the distributions that targets were drawn from, in nats."""
    clip_share: float
    """Share of targets whose gain was clipped, which have no gradient."""
    drift_mean: float
    """Mean absolute difference of the trainer's log-probability and the engine's. Before the first update after the
    answers were drawn, the weights are the same, and it is what the two computations differ by."""
    drift_max: float
    ratio_far: float
    """Share of targets whose ratio of probabilities is not within 1 +- 0.01."""


class PolicyLoss:
    """A `training.forward.LossFunction` for the microbatches of `trees.microbatches`.

    The loss is summed over targets. The engine that calls it divides by all targets of the step, so each token weighs
    the same, in long answers and short ones. There is no KL term.

    Args:
        config: how far ratios count.
        vocab_size: ids of the tokenizer. The rows of the output layer beyond are padding, which the engine never draws,
            so they take no part in the probabilities here either.
        device: where the model is.
    """

    def __init__(self, config: PolicyConfig, vocab_size: int, device: torch.device) -> None:
        self.config, self.vocab_size, self.device = config, vocab_size, device
        self._reset()

    def _reset(self) -> None:
        self._sums = torch.zeros(5, dtype=torch.float64, device=self.device)
        self._largest = torch.zeros((), dtype=torch.float64, device=self.device)

    def __call__(self, model: nn.Module, batch: Microbatch, placer: TokenPlacer) -> tuple[Tensor, Tensor]:
        """See `LossFunction`."""
        names = ("input_ids", "contexts", "targets", "old_logprobs", "advantages")
        ids, contexts, targets, old, advantages = (to_device(batch[name], placer.device) for name in names)
        position_ids, params = placer.place(batch, ids)
        logits = model(ids, position_ids, attention_mask=None, packed_seq_params=params)
        logits = logits.flatten(0, 1).index_select(0, contexts)[:, : self.vocab_size]
        logprobs = token_logprobs(logits, targets)
        log_ratio = logprobs - old.to(logprobs.dtype)
        ratio, advantages = log_ratio.exp(), advantages.to(logprobs.dtype)
        gain = clipped_objective(ratio, advantages, self.config.clip_low, self.config.clip_high)
        self._count(logits.detach(), log_ratio.detach(), (gain < ratio * advantages).detach())
        return -gain.sum(), params.num_visible_pairs()

    def _count(self, logits: Tensor, log_ratio: Tensor, clipped: Tensor) -> None:
        spread = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
        entropy = -(spread.exp() * spread).sum()
        drift = log_ratio.abs()
        far = (log_ratio.expm1().abs() > NEAR).sum()
        count = torch.tensor(len(drift), device=drift.device)
        self._sums += torch.stack([x.double() for x in (count, entropy, clipped.sum(), drift.sum(), far)])
        if len(drift):
            self._largest = torch.maximum(self._largest, drift.max().double())

    def take(self) -> PolicyNumbers:
        """The numbers since the last call; waits for the device."""
        count, entropy, clipped, drift, far = self._sums.tolist()
        whole, largest = max(1.0, count), float(self._largest)
        self._reset()
        return PolicyNumbers(int(count), entropy / whole, clipped / whole, drift / whole, largest, far / whole)
