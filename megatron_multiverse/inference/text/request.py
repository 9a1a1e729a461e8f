"""What goes into the engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from megatron_multiverse.config.engine import SamplingParams
from megatron_multiverse.errors import GenerationError


@dataclass(frozen=True, kw_only=True)
class Request:
    """One prompt to continue."""

    prompt_ids: Sequence[int]
    """Token ids; tags among them are inert."""
    sampling: SamplingParams = field(default_factory=SamplingParams)
    """How the answer is drawn, and where it ends."""
    sample: int = 0
    """Number of the answer, to draw several to one prompt with one seed."""

    def __post_init__(self) -> None:
        if len(self.prompt_ids) == 0:
            raise GenerationError("prompt_ids is empty; give at least one token")
