"""What goes into the engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_multiverse.errors import GenerationError


@dataclass(frozen=True, kw_only=True)
class Request:
    """One prompt to continue."""

    prompt_ids: Sequence[int]
    """Token ids; tags among them are inert."""
    max_tokens: int = 512
    """Most tokens of the answer, forced ones and all branches included. A fork splits what is left evenly among its
    paths, so that no path depends on how fast its siblings run; what they do not use comes back at the join."""
    max_critical_tokens: int | None = None
    """Most tokens on the longest chain of the answer."""
    temperature: float = 0.0
    """0 is greedy."""
    top_k: int = 0
    """0 is off."""
    top_p: float = 1.0
    """1 is off."""
    seed: int = 0
    """Same seed, prompt and settings: same answer, whatever else runs."""
    sample: int = 0
    """Number of the sample, to draw several answers to one prompt with one seed."""
    max_concurrent_branches: int | None = None
    """Most branches that run at once; 1 decodes path after path with the same result."""
    stop_token_ids: Sequence[int] = ()
    """Further ids that end the answer, outside of paths; like the end-of-document id they are not part of it."""
    ignore_eos: bool = False
    """Treat the end-of-document id as text."""

    def __post_init__(self) -> None:
        checks = (
            (len(self.prompt_ids) > 0, "prompt_ids is empty; give at least one token"),
            (self.max_tokens >= 1, f"max_tokens must be at least 1, got {self.max_tokens}"),
            (
                self.max_critical_tokens is None or self.max_critical_tokens >= 1,
                f"max_critical_tokens must be at least 1 or None, got {self.max_critical_tokens}",
            ),
            (0 <= self.temperature < float("inf"), f"temperature must be finite and >= 0, got {self.temperature}"),
            (self.top_k >= 0, f"top_k must be >= 0 (0 is off), got {self.top_k}"),
            (0 < self.top_p <= 1, f"top_p must lie in (0, 1], got {self.top_p}"),
            (
                self.max_concurrent_branches is None or self.max_concurrent_branches >= 1,
                f"max_concurrent_branches must be at least 1 or None, got {self.max_concurrent_branches}",
            ),
        )
        for good, message in checks:
            if not good:
                raise GenerationError(message)
