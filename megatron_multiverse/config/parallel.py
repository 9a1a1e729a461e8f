"""How a training run is spread over ranks, in megatron-core's names. Imports no torch."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from megatron_multiverse.config.model import ModelConfig
from megatron_multiverse.config.strict import check, check_choices

_SIZES = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "virtual_pipeline_model_parallel_size",
    "context_parallel_size",
)
_GROUPS = range(1, 65)
"""Sizes of groups that errors look at when they say what is allowed."""
_CP_CHUNK = 16
"""Fewest neighbouring tokens that are dealt out together to a context parallel rank."""


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """Sizes of the parallel groups. What they leave of the ranks is data parallel."""

    tensor_model_parallel_size: int = 1
    """Ranks that share each layer; best within one node."""
    sequence_parallel: bool = False
    """Split norms and residuals by tokens over the tensor parallel ranks, which saves their memory; needs
    tensor_model_parallel_size above 1."""
    pipeline_model_parallel_size: int = 1
    """Stages that the layers are cut into, each on its own ranks."""
    virtual_pipeline_model_parallel_size: int = 1
    """Chunks of layers of each stage (interleaved schedule): more of them idle less and communicate more. Above 1 it
    needs pipeline_model_parallel_size above 1 and a multiple of it as number of microbatches."""
    context_parallel_size: int = 1
    """Ranks that share the tokens of each row."""
    cp_comm_type: Literal["all_gather", "a2a"] = "all_gather"
    """How context parallel ranks attend to each other's tokens: all_gather gives each rank the keys and values of all,
    with the queries dealt out by visible area; a2a exchanges tokens for heads, and needs at least as many key/value
    heads per tensor parallel rank as context_parallel_size."""

    def __post_init__(self) -> None:
        check_choices(self, "parallel.")
        for name in _SIZES:
            check(getattr(self, name) >= 1, f"parallel.{name} must be at least 1, got {getattr(self, name)}")
        check(
            not self.sequence_parallel or self.tensor_model_parallel_size > 1,
            "parallel.sequence_parallel has no effect without parallel.tensor_model_parallel_size above 1: set both or "
            "neither",
        )
        check(
            self.virtual_pipeline_model_parallel_size == 1 or self.pipeline_model_parallel_size > 1,
            f"parallel.virtual_pipeline_model_parallel_size {self.virtual_pipeline_model_parallel_size} has no effect "
            "without parallel.pipeline_model_parallel_size above 1: set both or neither",
        )
        check(
            self.cp_comm_type == "all_gather" or self.context_parallel_size > 1,
            f"parallel.cp_comm_type {self.cp_comm_type} has no effect without parallel.context_parallel_size above 1: "
            "set both or neither",
        )
        check(
            self.world_size % self.model_ranks == 0,
            f"{self.world_size} ranks (WORLD_SIZE) cannot be divided into groups of {self.model_ranks} = "
            "parallel.tensor_model_parallel_size x pipeline_model_parallel_size x context_parallel_size: start a "
            f"multiple of that with torchrun or srun (a --dry-run alone needs WORLD_SIZE={self.model_ranks} in its "
            "environment), or make the sizes smaller",
        )

    @property
    def world_size(self) -> int:
        """Ranks of the run: WORLD_SIZE, which torchrun sets, else 1."""
        return int(os.environ.get("WORLD_SIZE", "1"))

    @property
    def model_ranks(self) -> int:
        """Ranks that together hold one model and work on the same rows."""
        return self.tensor_model_parallel_size * self.pipeline_model_parallel_size * self.context_parallel_size

    @property
    def token_parts(self) -> int:
        """Parts into which the tokens of a microbatch are cut between attention blocks."""
        return self.context_parallel_size * (self.tensor_model_parallel_size if self.sequence_parallel else 1)

    @property
    def data_parallel_size(self) -> int:
        """Groups of ranks that each hold a whole model and read rows of their own."""
        return self.world_size // self.model_ranks

    def check_model(self, model: ModelConfig) -> None:
        """Raise ConfigError, which names both numbers, if the model cannot be cut into these parts.

        More tensor parallel ranks than key/value heads are allowed: those that share a head gather its rows.
        """
        tp, heads, groups = self.tensor_model_parallel_size, model.num_attention_heads, model.num_query_groups
        remedy = f"this model takes {_listed(size for size in _GROUPS if _tensor_parallel_can_cut(model, size))}"
        for name in ("num_attention_heads", "ffn_hidden_size"):
            size = getattr(model, name)
            check(
                size % tp == 0,
                f"parallel.tensor_model_parallel_size ({tp}) must divide the model's {name} ({size}): {remedy}",
            )
        check(
            groups % tp == 0 or tp % groups == 0,
            f"parallel.tensor_model_parallel_size ({tp}) must be a divisor or a multiple of the model's "
            f"num_query_groups ({groups}): {remedy}",
        )
        stages = self.pipeline_model_parallel_size * self.virtual_pipeline_model_parallel_size
        check(
            model.num_layers % stages == 0,
            "parallel.pipeline_model_parallel_size x virtual_pipeline_model_parallel_size "
            f"({self.pipeline_model_parallel_size} x {self.virtual_pipeline_model_parallel_size}) must divide the "
            f"model's num_layers ({model.num_layers}): their product can be "
            f"{_listed(size for size in _GROUPS if model.num_layers % size == 0)}",
        )
        heads_here = max(1, groups // tp)
        check(
            self.cp_comm_type != "a2a" or (heads_here % self.context_parallel_size == 0),
            f"parallel.cp_comm_type a2a needs a context_parallel_size ({self.context_parallel_size}) that divides the "
            f"key/value heads of a tensor parallel rank ({heads_here} of {groups}; {heads} query heads): set "
            "cp_comm_type to all_gather",
        )

    def check_rows(self, seq_length: int, num_microbatches: int) -> None:
        """Raise ConfigError if rows of that length, or that many of them in a step, cannot be shared out."""
        cp, tp = self.context_parallel_size, self.tensor_model_parallel_size if self.sequence_parallel else 1
        parts = cp * math.lcm(tp, _CP_CHUNK if cp > 1 else 1)
        check(
            seq_length % parts == 0,
            f"data.seq_length ({seq_length}) must be a multiple of {parts}, so that parallel.context_parallel_size "
            f"({cp}) parts of it are whole chunks of {_CP_CHUNK} tokens, and sequence_parallel can cut each by "
            f"tensor_model_parallel_size ({self.tensor_model_parallel_size})",
        )
        pp = self.pipeline_model_parallel_size
        check(
            self.virtual_pipeline_model_parallel_size == 1 or num_microbatches % pp == 0,
            f"an interleaved pipeline needs a multiple of parallel.pipeline_model_parallel_size ({pp}) microbatches, "
            f"got {num_microbatches}: change data.global_batch_size or data.micro_batch_size (training) or eval_iters",
        )


def _tensor_parallel_can_cut(model: ModelConfig, size: int) -> bool:
    """Whether the layers of the model can be shared by so many tensor parallel ranks."""
    groups = model.num_query_groups
    divides = model.num_attention_heads % size == model.ffn_hidden_size % size == 0
    return divides and (groups % size == 0 or size % groups == 0)


def _listed(numbers: Iterable[int]) -> str:
    """1, 2 or 4."""
    *others, last = map(str, numbers)
    return f"{', '.join(others)} or {last}" if others else last
