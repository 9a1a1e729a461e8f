"""Forward and backward passes over all ranks of a model, by megatron-core's schedules.

Every rank of a model gets the same microbatches from its loader, lays them out by itself, once each, and so has
position ids, labels and layout on every pipeline stage without sending them. What travels between stages are
activations alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor, distributed

from megatron_multiverse.model.attention import AttentionParams
from megatron_multiverse.model.context_parallel import share_tokens
from megatron_multiverse.model.device import to_device
from megatron_multiverse.parallel.ranks import Ranks
from megatron_multiverse.training.forward import LossFunction
from megatron_multiverse.training.microbatches import Microbatch
from megatron_multiverse.training.phases import PhaseClock
from megatron_multiverse.training.placement import TokenPlacer
from megatron_multiverse.training.validation import TagCounter


@dataclass
class PlacedMicrobatch:
    """What this rank's part of the model is called with. Tensors [b, s], or [b, s / context parallel size], on the
    device."""

    input_ids: Tensor
    position_ids: Tensor
    labels: Tensor
    loss_mask: Tensor
    params: AttentionParams
    visible_pairs: Tensor
    """Pairs of the whole microbatch, int64 scalar; counted on one rank of each model, 0 on the others."""


class PlacedMicrobatches:
    """The microbatches of a step, each laid out when the first chunk of the model asks for it and shared by all chunks.

    Args:
        microbatches: on the host.
        placer: lays them out.
        comm_type: how context parallel ranks share the tokens; None without context parallelism.
        num_chunks: chunks of the model on this rank.
    """

    def __init__(
        self, microbatches: Sequence[Microbatch], placer: TokenPlacer, comm_type: str | None, num_chunks: int
    ) -> None:
        self._microbatches, self._placer, self._comm_type = microbatches, placer, comm_type
        self._num_chunks = num_chunks
        self._placed: dict[int, tuple[PlacedMicrobatch, int]] = {}
        self.visible_pairs = torch.zeros((), dtype=torch.int64, device=placer.device)
        """Of all microbatches placed so far."""

    def iterators(self) -> list[Iterator[PlacedMicrobatch]]:
        """One for each chunk."""
        return [self._iterate() for _ in range(self._num_chunks)]

    def _iterate(self) -> Iterator[PlacedMicrobatch]:
        for number in range(len(self._microbatches)):
            yield self._get(number)

    def _get(self, number: int) -> PlacedMicrobatch:
        if number not in self._placed:
            placed = place(self._microbatches[number], self._placer, self._comm_type)
            self.visible_pairs += placed.visible_pairs
            self._placed[number] = placed, self._num_chunks
        placed, waiting = self._placed.pop(number)
        if waiting > 1:  # the last chunk that asks takes it along, so that its memory is free after the backward pass
            self._placed[number] = placed, waiting - 1
        return placed


def place(batch: Microbatch, placer: TokenPlacer, comm_type: str | None) -> PlacedMicrobatch:
    """Lay out one microbatch; of its tokens this context parallel rank gets its own."""
    device = placer.device
    ids, labels, loss_mask = (to_device(batch[name], device) for name in ("input_ids", "labels", "loss_mask"))
    position_ids, params = placer.place(batch, ids)
    pairs = params.num_visible_pairs() if counts_for_its_model() else torch.zeros((), dtype=torch.int64, device=device)
    if comm_type is not None:
        params, places = share_tokens(params, batch["r"], comm_type)
        ids, position_ids, labels, loss_mask = (x.gather(1, places) for x in (ids, position_ids, labels, loss_mask))
    return PlacedMicrobatch(ids, position_ids, labels, loss_mask, params, pairs)


def counts_for_its_model() -> bool:
    """Whether this rank adds to sums over models what all ranks of its model know."""
    ranks = parallel_state.get_model_parallel_group().rank(), parallel_state.get_context_parallel_rank()
    return ranks == (0, 0)


def tokens_of_step(ranks: Ranks, microbatches: Sequence[Microbatch]) -> tuple[int, int]:
    """Tokens with a loss, and all tokens, in the microbatches of all data parallel ranks, of which each is several
    ranks with the same rows."""
    loss_tokens = sum(int(batch["loss_mask"].sum()) for batch in microbatches)
    tokens = sum(batch["input_ids"].numel() for batch in microbatches)
    loss_tokens, tokens = ranks.sum([count * counts_for_its_model() for count in (loss_tokens, tokens)])
    return loss_tokens, tokens


def reduced(sums: Tensor) -> Tensor:
    """Element-wise sums over all ranks, in place."""
    distributed.all_reduce(sums)
    return sums


def run_schedule(
    chunks: Sequence[Any],
    microbatches: Sequence[Microbatch],
    placer: TokenPlacer,
    scale: float,
    *,
    comm_type: str | None = None,
    tags: TagCounter | None = None,
    forward_only: bool,
    loss: LossFunction | None = None,
    clock: PhaseClock | None = None,
) -> Tensor:
    """Run all microbatches through the model; gradients are added to the parameters' `main_grad`.

    Args:
        chunks: this rank's part of the model: DistributedDataParallel around each chunk.
        microbatches: those of this data parallel rank; with `loss` each may have another number of them.
        placer: lays them out.
        scale: what the summed loss is multiplied with before it is differentiated.
        comm_type: how context parallel ranks share the tokens; None without context parallelism.
        tags: counts tags; None counts none.
        forward_only: no gradients.
        loss: what is differentiated; default: the model's own loss at the labels. It goes neither with pipeline
            stages nor with context parallel ranks.
        clock: times the forward passes; None times nothing.

    Returns:
        float64 [4] on the device, what this rank adds to the sums over all ranks: loss over the trained tokens, visible
        pairs, tags, correct tags.
    """
    batches: PlacedMicrobatches | _LossOfMicrobatches
    if loss is None:
        batches = PlacedMicrobatches(microbatches, placer, comm_type, len(chunks))
        forward = partial(_forward, scale=scale, tags=tags)
    else:
        batches = _LossOfMicrobatches(loss, microbatches, placer)
        forward = partial(batches.forward, scale=scale)
    rows, length = microbatches[0]["input_ids"].shape
    sums = get_forward_backward_func()(
        forward_step_func=forward if clock is None else clock.around_forward(forward),
        data_iterator=batches.iterators(),
        model=list(chunks),
        num_microbatches=len(microbatches),
        seq_length=length,
        micro_batch_size=rows,
        forward_only=forward_only,
    )
    total = torch.zeros(4, dtype=torch.float64, device=placer.device)
    total[1] = batches.visible_pairs
    if parallel_state.get_tensor_model_parallel_rank() == 0:  # all tensor parallel ranks have the same sums
        for loss_sum, of_tags in sums:  # empty but on the last stage
            total[0] += loss_sum
            total[2:] += of_tags
    return total


def _forward(
    batches: Iterator[PlacedMicrobatch], model: Any, *, scale: float, tags: TagCounter | None
) -> tuple[Tensor, Any]:
    """megatron-core's `forward_step_func`."""
    batch = next(batches)
    output = model(
        batch.input_ids,
        batch.position_ids,
        attention_mask=None,
        labels=batch.labels,
        loss_mask=batch.loss_mask,
        packed_seq_params=batch.params,
    )
    of_tags = None if tags is None else tags.count(batch.labels, batch.loss_mask)
    return output, partial(_loss, scale, of_tags)


class _LossOfMicrobatches:
    """The same for a loss that lays out its microbatches by itself."""

    def __init__(self, loss: LossFunction, microbatches: Sequence[Microbatch], placer: TokenPlacer) -> None:
        self._loss, self._microbatches, self._placer = loss, microbatches, placer
        self.visible_pairs = torch.zeros((), dtype=torch.int64, device=placer.device)

    def iterators(self) -> list[Iterator[Microbatch]]:
        """One, for the one chunk of the model."""
        return [iter(self._microbatches)]

    def forward(self, batches: Iterator[Microbatch], model: Any, *, scale: float) -> tuple[Tensor, Any]:
        """megatron-core's `forward_step_func`."""
        loss_sum, pairs = self._loss(model, next(batches), self._placer)
        if counts_for_its_model():
            self.visible_pairs += pairs
        return loss_sum, lambda loss_sum: (loss_sum * scale, _no_count(loss_sum), (loss_sum.detach(), 0.0))


def _loss(
    scale: float, of_tags: Tensor | None, loss_sum: Tensor
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor | float]]:
    """What is differentiated, a token count that nobody uses, and what `run_schedule` adds up.

    Gradients are divided by the tokens of the whole step from the start (`scale`), as in one process; megatron-core
    would divide at the end by counts that it adds up here.
    """
    return loss_sum * scale, _no_count(loss_sum), (loss_sum.detach(), 0.0 if of_tags is None else of_tags)


def _no_count(like: Tensor) -> Tensor:
    return torch.ones((), dtype=torch.int, device=like.device)
