"""The policy loss of DAPO (arXiv 2503.14476) over the tokens that the model drew, and what is measured on the way."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed, nn
from torch.utils.checkpoint import checkpoint

from megatron_multiverse.config import PolicyConfig
from megatron_multiverse.kernels.sampling import token_logprobs
from megatron_multiverse.model.device import to_device
from megatron_multiverse.model.mcore import parallel_state, tensor_parallel, tensor_parallel_place
from megatron_multiverse.training.microbatches import Microbatch
from megatron_multiverse.training.placement import TokenPlacer

NEAR = 0.01
"""Ratios of new to old probability within 1 +- NEAR count as equal."""

CHUNK = 1024
"""Targets whose logits stand in float32 at once."""


@contextlib.contextmanager
def logits_only_at(model: Any, places: Tensor, b: int, s: int) -> Iterator[None]:
    """Within the block the model's output layer sees the hidden states at these places alone: its logits are
    [1, places, vocab].

    Args:
        model: megatron-core's GPTModel, or its DistributedDataParallel around one.
        places: int64 [T], indices into the b x s tokens.
        b: rows.
        s: tokens of each.
    """
    rows = places % s * b + places // s  # hidden states are [s, b, hidden]

    def select(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (args[0].flatten(0, 1).index_select(0, rows)[:, None], *args[1:])

    hook = getattr(model, "module", model).output_layer.register_forward_pre_hook(select)
    try:
        yield
    finally:
        hook.remove()


def clipped_objective(ratio: Tensor, advantages: Tensor, clip_low: float, clip_high: float) -> Tensor:
    """What each token gains: the smaller one of ratio x advantage and clipped ratio x advantage."""
    return torch.minimum(ratio * advantages, ratio.clamp(1 - clip_low, 1 + clip_high) * advantages)


def kl_estimate(logprobs: Tensor, reference: Tensor) -> Tensor:
    """What each drawn token tells of the divergence from a reference model, from its log-probabilities under both: the
    estimate that GRPO takes (arXiv 2402.03300, k3), never negative and right on average."""
    log_ratio = reference - logprobs
    return log_ratio.exp() - log_ratio - 1


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
    kl: float
    """Mean estimate of the divergence from the reference model, in nats per target; 0 without one."""


class PolicyLoss:
    """A `training.forward.LossFunction` for the microbatches of `trees.microbatches`.

    The loss is summed over targets. The engine that calls it divides by all targets of the step, so each token weighs
    the same, in long answers and short ones.

    Logits are made for targets only, and their float32 copies live for one chunk of targets at a time: with a
    vocabulary of 150 thousand those of a long row would not fit beside the model.

    The logits of tensor parallel ranks, each of a part of the vocabulary, are brought together on all of them, as the
    engine does.

    Args:
        config: how far ratios count.
        vocab_size: ids of the tokenizer. The rows of the output layer beyond are padding, which the engine never draws,
            so they take no part in the probabilities here either.
        device: where the model is.
        reference: a model like it that is not trained, from which `kl_coef` keeps the trained one near.
    """

    def __init__(
        self, config: PolicyConfig, vocab_size: int, device: torch.device, reference: nn.Module | None = None
    ) -> None:
        self.config, self.vocab_size, self.device, self.reference = config, vocab_size, device, reference
        self._is_spread = tensor_parallel_place()[0] > 1
        self._reset()

    def _reset(self) -> None:
        self._sums = torch.zeros(6, dtype=torch.float64, device=self.device)
        self._largest = torch.zeros((), dtype=torch.float64, device=self.device)

    def __call__(self, model: nn.Module, batch: Microbatch, placer: TokenPlacer) -> tuple[Tensor, Tensor]:
        """See `LossFunction`."""
        names = ("input_ids", "contexts", "targets", "old_logprobs", "advantages")
        ids, contexts, targets, old, advantages = (to_device(batch[name], placer.device) for name in names)
        position_ids, params = placer.place(batch, ids)

        def logprobs_by(model: nn.Module, *, count: bool) -> Tensor:
            with logits_only_at(model, contexts, *ids.shape):
                logits = model(ids, position_ids, attention_mask=None, packed_seq_params=params)[0]
            chunks = zip(torch.split(logits, CHUNK), torch.split(targets, CHUNK), strict=True)
            return torch.cat([self._logprobs(*chunk, count=count) for chunk in chunks])

        logprobs = logprobs_by(model, count=True)
        log_ratio = logprobs - old.to(logprobs.dtype)
        ratio, advantages = log_ratio.exp(), advantages.to(logprobs.dtype)
        gain = clipped_objective(ratio, advantages, self.config.clip_low, self.config.clip_high)
        self._count(log_ratio.detach(), (gain < ratio * advantages).detach())
        loss_sum = -gain.sum()
        if self.reference is not None:
            with torch.no_grad():
                theirs = logprobs_by(self.reference, count=False)
            kl = kl_estimate(logprobs, theirs).sum()
            self._sums[5] += kl.detach()
            loss_sum = loss_sum + self.config.kl_coef * kl
        return loss_sum, params.num_visible_pairs()

    def _drawable(self, logits: Tensor) -> Tensor:
        """Logits of the whole vocabulary without its padding: [T, vocab / ranks] -> [T, vocab size]."""
        whole = tensor_parallel.gather_from_tensor_model_parallel_region(logits) if self._is_spread else logits
        return whole[:, : self.vocab_size]

    @torch.no_grad()
    def _count_entropy(self, logits: Tensor) -> None:
        spread = self._drawable(logits).to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
        self._sums[1] -= (spread.exp() * spread).sum()

    def _logprobs(self, logits: Tensor, targets: Tensor, *, count: bool) -> Tensor:
        """Log-probabilities of a chunk of targets; the backward pass makes the float32 logits again."""
        if count:
            self._count_entropy(logits)
        logprobs: Tensor = checkpoint(
            lambda logits: token_logprobs(self._drawable(logits), targets), logits, use_reentrant=False
        )
        return logprobs

    def _count(self, log_ratio: Tensor, clipped: Tensor) -> None:
        drift = log_ratio.abs()
        self._sums[0] += len(drift)
        self._sums[2] += clipped.sum()
        self._sums[3] += drift.sum()
        self._sums[4] += (log_ratio.expm1().abs() > NEAR).sum()
        self._largest = torch.maximum(self._largest, torch.cat((drift, drift.new_zeros(1))).max().double())

    def take(self) -> PolicyNumbers:
        """The numbers of all ranks since the last call; collective, and waits for the device."""
        if parallel_state.get_data_parallel_world_size() > 1:
            group = parallel_state.get_data_parallel_group()
            distributed.all_reduce(self._sums, group=group)
            distributed.all_reduce(self._largest, distributed.ReduceOp.MAX, group=group)
        count, *sums = self._sums.tolist()
        entropy, clipped, drift, far, kl = (value / max(1.0, count) for value in sums)
        largest = float(self._largest)
        self._reset()
        return PolicyNumbers(int(count), entropy, clipped, drift, largest, far, kl)
