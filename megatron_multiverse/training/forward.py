"""Forward and backward passes over the microbatches of one step, and validation."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from megatron_multiverse.config import TrainConfig
from megatron_multiverse.training.placement import TokenPlacer, to_device

Microbatch = dict[str, Tensor]
"""input_ids, labels, position_ids, r [b, s] int; loss_mask [b, s] float, 1 where labels are trained. And what tells
the documents apart: documents, sample_ids, malformed (see SFTLoader)."""


@dataclass(frozen=True)
class StepResult:
    """Sums over the microbatches of one step; tensors stay on the device."""

    loss_sum: Tensor
    """Sum of the loss over all trained tokens."""
    loss: Tensor
    """loss_sum / loss_tokens: what was differentiated."""
    loss_tokens: int
    """Trained tokens."""
    tokens: int
    """All tokens, padding included."""
    visible_pairs: Tensor
    """(query, key) pairs that attention computed, per layer and head."""


def precision(dtype: str, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """What a forward pass runs in: autocast for "bf16", nothing otherwise."""
    if dtype == "bf16":
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return contextlib.nullcontext()


def backward_precision(model: nn.Module, dtype: str, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """What a backward pass runs in: autocast where megatron-core does not restore it by itself.

    Its linear layers do so for CUDA alone, its activation recompute nowhere.
    """
    recompute = getattr(getattr(model, "config", None), "recompute_granularity", None)
    return precision(dtype, device) if device.type == "cpu" or recompute else contextlib.nullcontext()


def masked_loss_sum(
    model: nn.Module, batch: Microbatch, device: torch.device, backend: str, layouts: TokenPlacer | None = None
) -> tuple[Tensor, Tensor]:
    """Loss summed over the trained tokens of one microbatch, and its number of visible pairs."""
    ids, labels, loss_mask = (to_device(batch[name], device) for name in ("input_ids", "labels", "loss_mask"))
    position_ids, params = (layouts or TokenPlacer(None, device)).place(batch, ids, backend)
    per_token = model(ids, position_ids, attention_mask=None, labels=labels, packed_seq_params=params)
    return (per_token * loss_mask).sum(), params.num_visible_pairs()


def forward_backward(
    model: nn.Module,
    microbatches: list[Microbatch],
    device: torch.device,
    dtype: str,
    backend: str,
    layouts: TokenPlacer | None = None,
) -> StepResult:
    """Gradients of the mean loss over *all* trained tokens of the step, added to the parameters' `.grad`.

    Each microbatch is divided by the token count of the whole step, not by its own: a mean of means would weight
    the tokens of sparse microbatches more. The counts come from the host copies, so nothing waits for the device.
    """
    loss_tokens = sum(int(batch["loss_mask"].sum()) for batch in microbatches)
    loss_sum = torch.zeros((), device=device)
    pairs = torch.zeros((), dtype=torch.int64, device=device)
    for batch in microbatches:
        with precision(dtype, device):
            batch_sum, batch_pairs = masked_loss_sum(model, batch, device, backend, layouts)
        with backward_precision(model, dtype, device):
            (batch_sum / max(1, loss_tokens)).backward()  # type: ignore[no-untyped-call]
        loss_sum += batch_sum.detach()
        pairs += batch_pairs
    tokens = sum(batch["input_ids"].numel() for batch in microbatches)
    return StepResult(loss_sum, loss_sum / max(1, loss_tokens), loss_tokens, tokens, pairs)


@torch.no_grad()
def validate(
    model: nn.Module,
    batches: Iterable[Microbatch],
    iters: int,
    device: torch.device,
    dtype: str,
    backend: str,
    layouts: TokenPlacer | None = None,
) -> tuple[float, int]:
    """Mean loss over the trained tokens of the first `iters` microbatches, and how many tokens that were."""
    total, count = torch.zeros((), dtype=torch.float64, device=device), 0
    for batch in islice(batches, iters):
        with precision(dtype, device):
            total += masked_loss_sum(model, batch, device, backend, layouts)[0]
        count += int(batch["loss_mask"].sum())
    return float(total) / max(1, count), count


@contextlib.contextmanager
def arithmetic(config: TrainConfig) -> Iterator[None]:
    """How numbers are computed, for the length of the block: TF32 for dtype float32 on GPUs that have it, and
    algorithms that give the same bits in every run if the config asks for them."""
    precision = torch.get_float32_matmul_precision()
    deterministic = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.set_float32_matmul_precision("high" if config.dtype == "float32" else precision)
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts; its deterministic choice
        torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)
        torch.use_deterministic_algorithms(deterministic[0], warn_only=deterministic[1])
