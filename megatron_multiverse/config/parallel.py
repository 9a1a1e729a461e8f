"""How a training run is spread over ranks, in megatron-core's names. Imports no torch."""

from __future__ import annotations

import os
from dataclasses import dataclass

from megatron_multiverse.config.strict import check

_SIZES = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size")


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """Sizes of the parallel groups. Training runs in one process so far, so every size must be 1."""

    tensor_model_parallel_size: int = 1
    """Ranks that share each layer; only 1 so far."""
    pipeline_model_parallel_size: int = 1
    """Stages that the layers are cut into; only 1 so far."""
    context_parallel_size: int = 1
    """Ranks that share the tokens of each row; only 1 so far."""
    sequence_parallel: bool = False
    """Split norms and residuals by tokens over the tensor parallel ranks; needs tensor_model_parallel_size above 1, so
    only false so far."""

    def __post_init__(self) -> None:
        for name in _SIZES:
            size = getattr(self, name)
            check(size >= 1, f"parallel.{name} must be at least 1, got {size}")
            check(size == 1, f"parallel.{name} is {size}, but training runs in one process so far: set it to 1")
        check(
            not self.sequence_parallel,
            "parallel.sequence_parallel has no effect without parallel.tensor_model_parallel_size above 1, which "
            "training does not have yet: set it to false",
        )
        check(
            self.world_size == 1,
            f"WORLD_SIZE is {self.world_size}, but training runs in one process so far, and each of them would train "
            "the same model into the same folder: start one process, without torchrun",
        )

    @property
    def world_size(self) -> int:
        """Ranks of the run: WORLD_SIZE, which torchrun sets, else 1."""
        return int(os.environ.get("WORLD_SIZE", "1"))

    @property
    def data_parallel_size(self) -> int:
        """Groups of ranks that each hold a whole model and read rows of their own."""
        model_ranks = self.tensor_model_parallel_size * self.pipeline_model_parallel_size * self.context_parallel_size
        return self.world_size // model_ranks
