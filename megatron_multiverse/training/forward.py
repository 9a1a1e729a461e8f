"""Forward and backward passes of one process: loss and gradients of a step, loss and tags of a validation."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from megatron_multiverse.config import TrainConfig
from megatron_multiverse.model.device import to_device
from megatron_multiverse.training.engine import LossSums
from megatron_multiverse.training.microbatches import Microbatch
from megatron_multiverse.training.placement import TokenPlacer
from megatron_multiverse.training.validation import TagCounter, Validation

LossFunction = Callable[[nn.Module, Microbatch, TokenPlacer], tuple[Tensor, Tensor]]
"""(model, microbatch, placer) -> loss summed over the microbatch's trained tokens, and its number of visible pairs."""


def precision(dtype: str, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """What a forward pass runs in: autocast for "bf16", nothing otherwise."""
    if dtype == "bf16":
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return contextlib.nullcontext()


def backward_precision(model: Any, dtype: str, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """What a backward pass runs in: autocast where megatron-core does not restore it by itself.

    Its linear layers restore it on CUDA only, its activation recompute nowhere.
    """
    recompute = model.config.recompute_granularity
    return precision(dtype, device) if device.type == "cpu" or recompute else contextlib.nullcontext()


def masked_loss_sum(model: nn.Module, batch: Microbatch, placer: TokenPlacer) -> tuple[Tensor, Tensor]:
    """Loss summed over the trained tokens of one microbatch, and its number of visible pairs."""
    ids, labels, loss_mask = (to_device(batch[name], placer.device) for name in ("input_ids", "labels", "loss_mask"))
    position_ids, params = placer.place(batch, ids)
    loss_sum = model(
        ids, position_ids, attention_mask=None, labels=labels, loss_mask=loss_mask, packed_seq_params=params
    )
    return loss_sum, params.num_visible_pairs()


def forward_backward(
    model: nn.Module,
    microbatches: Sequence[Microbatch],
    placer: TokenPlacer,
    dtype: str,
    loss: LossFunction = masked_loss_sum,
) -> LossSums:
    """Gradients of the mean loss over *all* trained tokens of the step, added to the parameters' `.grad`.

    Each microbatch is divided by the token count of the whole step, not by its own: a mean of means would weight
    the tokens of sparse microbatches more. The counts come from the host copies, so nothing waits for the device.
    """
    device = placer.device
    loss_tokens = sum(int(batch["loss_mask"].sum()) for batch in microbatches)
    loss_sum = torch.zeros((), device=device)
    pairs = torch.zeros((), dtype=torch.int64, device=device)
    for batch in microbatches:
        with precision(dtype, device):
            batch_sum, batch_pairs = loss(model, batch, placer)
        with backward_precision(model, dtype, device):
            (batch_sum / max(1, loss_tokens)).backward()  # type: ignore[no-untyped-call]
        loss_sum += batch_sum.detach()
        pairs += batch_pairs
    tokens = sum(batch["input_ids"].numel() for batch in microbatches)
    return LossSums(loss_sum, loss_tokens, tokens, pairs)


@torch.no_grad()
def validate(model: nn.Module, microbatches: Iterable[Microbatch], placer: TokenPlacer, dtype: str) -> Validation:
    """Mean loss and share of correct tags of the microbatches (waits for the device)."""
    sums, count = torch.zeros(3, dtype=torch.float64, device=placer.device), 0
    with TagCounter([model], placer.tag_ids) as tags:
        for batch in microbatches:
            with precision(dtype, placer.device):
                sums[0] += masked_loss_sum(model, batch, placer)[0]
            sums[1:] += tags.count(*(to_device(batch[name], placer.device) for name in ("labels", "loss_mask")))
            count += int(batch["loss_mask"].sum())
    return Validation.of_sums(sums, count)


@contextlib.contextmanager
def arithmetic(config: TrainConfig) -> Iterator[None]:
    """How numbers are computed, for the length of the block: TF32 for dtype float32 on GPUs that have it, and
    algorithms that give the same bits in every run if the config asks for them."""
    precision = torch.get_float32_matmul_precision()
    deterministic = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.set_float32_matmul_precision("high" if config.dtype == "float32" else precision)
    if config.deterministic:
        # cuBLAS reads this when it starts. With it, it gives the same bits in every run.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)
        torch.use_deterministic_algorithms(deterministic[0], warn_only=deterministic[1])
