"""The ranks that hold one model between them, as a step sees them.

Tensor parallel ranks each hold a part of every layer, pipeline stages some of the layers.

Every rank runs the same plans, in the same order, with its own layers, heads and key/value store. The first rank makes
the plans; `PlanChannel` brings them to the others over the host, as bytes. Every tensor parallel rank draws every token
itself, since the draw depends on the logits and the plan alone; the other pipeline stages are told by the last one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, distributed

from megatron_multiverse.inference.step.plan import StepPlan
from megatron_multiverse.model.mcore import parallel_state, pipeline_parallel_size, tensor_parallel_place

if TYPE_CHECKING:
    from megatron_multiverse.inference.step.symmetric_sum import SymmetricSum


@dataclass(frozen=True)
class ModelRanks:
    """This rank's place; with one rank all methods return what they are given."""

    tensor_size: int = 1
    tensor_rank: int = 0
    stages: int = 1
    stage: int = 0
    small_sum: SymmetricSum | None = None
    """Sums small tensors over the tensor parallel ranks, where there is a faster way than NCCL."""

    @classmethod
    def current(cls) -> ModelRanks:
        """The place in megatron-core's process groups."""
        size, rank = tensor_parallel_place()
        stages = pipeline_parallel_size()
        return cls(size, rank, stages, parallel_state.get_pipeline_model_parallel_rank())

    def on(self, like: Tensor, shape: Any) -> ModelRanks:
        """These ranks with the fastest way to sum the rows of a model; all ranks call it.

        Args:
            like: has the dtype and device of the rows.
            shape: the model's config, megatron-core's.
        """
        if self.tensor_size == 1 or not like.is_cuda:
            return self
        # Imported here: Triton comes with a GPU.
        from megatron_multiverse.inference.step.symmetric_sum import SymmetricSum

        group = parallel_state.get_tensor_model_parallel_group()
        return replace(self, small_sum=SymmetricSum.where_possible(group, like.dtype, like.device, shape.hidden_size))

    @property
    def size(self) -> int:
        """Ranks of the model."""
        return self.tensor_size * self.stages

    @property
    def is_first(self) -> bool:
        """Whether this rank makes the plans."""
        return self.tensor_rank == self.stage == 0

    @property
    def is_first_stage(self) -> bool:
        """Whether tokens enter the model here."""
        return self.stage == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether logits come out here."""
        return self.stage == self.stages - 1

    def embed(self, ids: Tensor, weight: Tensor) -> Tensor:
        """Rows of an embedding whose vocabulary is cut over the tensor parallel ranks: ids [n] -> [n, hidden]."""
        if self.tensor_size == 1:
            return torch.nn.functional.embedding(ids, weight)
        mine = ids - self.tensor_rank * len(weight)
        outside = (mine < 0) | (mine >= len(weight))
        rows = torch.nn.functional.embedding(mine.masked_fill(outside, 0), weight)
        return self.sum(rows.masked_fill_(outside[:, None], 0.0))

    def sum(self, x: Tensor) -> Tensor:
        """Sum over the tensor parallel ranks; x may be overwritten."""
        if self.small_sum is not None and self.small_sum.takes(x):
            return self.small_sum(x)
        if self.tensor_size > 1:
            distributed.all_reduce(x, group=parallel_state.get_tensor_model_parallel_group())
        return x

    def join_vocab(self, logits: Tensor) -> Tensor:
        """Logits [n, vocab / ranks] of each tensor parallel rank -> [n, vocab] on all of them."""
        if self.tensor_size == 1:
            return logits
        rows, columns = logits.shape
        parts = logits.new_empty(self.tensor_size * rows, columns)
        group = parallel_state.get_tensor_model_parallel_group()
        distributed.all_gather_into_tensor(parts, logits.contiguous(), group=group)
        return parts.view(-1, rows, columns).transpose(0, 1).flatten(1)

    def receive_hidden(self, tokens: int, like: Tensor, hidden: int) -> Tensor:
        """What the stage before this one computed, [tokens, hidden]; dtype and device are those of `like`."""
        x = like.new_empty(tokens, hidden)
        distributed.recv(x, parallel_state.get_pipeline_model_parallel_prev_rank())
        return x

    def send_hidden(self, x: Tensor) -> None:
        """Give the next stage [tokens, hidden]."""
        distributed.send(x.contiguous(), parallel_state.get_pipeline_model_parallel_next_rank())

    def from_last_stage(self, packed: Tensor | None, device: torch.device) -> Tensor:
        """int64 [lines, rows] of the last stage, on all stages.

        Args:
            packed: on the last stage.
            device: where it goes.
        """
        if self.stages == 1:
            assert packed is not None
            return packed
        group = parallel_state.get_pipeline_model_parallel_group()
        last = parallel_state.get_pipeline_model_parallel_last_rank()
        shape = torch.zeros(2, dtype=torch.int64, device=device)
        if packed is not None:
            shape.copy_(torch.tensor(packed.shape))
        distributed.broadcast(shape, last, group=group)
        if packed is None:
            packed = torch.empty(*shape.tolist(), dtype=torch.int64, device=device)
        packed = packed.contiguous()
        distributed.broadcast(packed, last, group=group)
        return packed


MOVED_ON = -1
"""Sent in place of a size, where the others know the step: most of a text."""


class PlanChannel:
    """Brings plans from the first rank of a model to its others, over the host. A program may hold several models."""

    def __init__(self) -> None:
        self._group = parallel_state.get_model_parallel_group()
        self._first: int = parallel_state.get_model_parallel_src_rank()
        self._last: StepPlan | None = None
        """What travelled last."""

    def _broadcast(self, tensor: Tensor) -> None:
        distributed.broadcast(tensor, self._first, group=self._group)

    def agree(self, *numbers: int) -> list[int]:
        """On the first rank: these numbers; on the others: those of the first."""
        tensor = torch.tensor(numbers)
        self._broadcast(tensor)
        return [int(number) for number in tensor]

    def send(self, plan: StepPlan | None) -> None:
        """On the first rank: the next step, or None for the end."""
        last, self._last = self._last, plan
        is_moved = plan is not None and last is not None and plan.moved_from is last.lengths
        if plan is not None and is_moved and plan.sampling.shaping is None and not len(plan.freed):
            self._broadcast(torch.tensor([MOVED_ON]))
            return
        data = b"" if plan is None else plan.to_bytes()
        self._broadcast(torch.tensor([len(data)]))
        if data:
            self._broadcast(torch.frombuffer(bytearray(data), dtype=torch.uint8))

    def receive(self) -> StepPlan | None:
        """On the others: what the first rank sent.

        It names the plan before it as the first rank's does (`StepPlan.moved_from`): all ranks must make the same lists
        of work, of the same steps, or one would capture a graph, which sums over all of them, while another has it.
        """
        size = torch.zeros(1, dtype=torch.int64)
        self._broadcast(size)
        if size == MOVED_ON:
            assert self._last is not None, "a step goes on from another"
            self._last = self._last.moved_on()
            return self._last
        last, self._last = self._last, None
        if size:
            data = torch.empty(int(size), dtype=torch.uint8)
            self._broadcast(data)
            self._last = StepPlan.from_bytes(data.numpy().data, last)
        return self._last
