"""Settings of decoding: what an engine is made of, and what one request asks for. Imports no torch.

Both are frozen and check themselves. Tools read them nested (``--engine.page-size 64 --sampling.temperature 0.7``).
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import SupportsIndex

from megatron_multiverse.errors import GenerationError
from megatron_multiverse.structure.tags import MAX_DEPTH


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Sizes and limits of an engine.

    Raises:
        GenerationError: a size that cannot work; the message names the field.
    """

    page_size: int = 16
    """Tokens per page of the cache. Pages of 1 are never copied, 16 and 64 have shorter page tables."""
    num_pages: int = 0
    """Pages of the cache, page_size * num_pages tokens in all; 0 takes enough for eight of the longest answers."""
    max_rows: int = 64
    """Branches per step."""
    max_step_tokens: int = 2048
    """Tokens per step beyond one per row; longer prompts are fed in chunks."""
    max_paths: int | None = 64
    """Goals with more outlines stay plain text; unset for no limit."""
    max_depth: int | None = MAX_DEPTH
    """Blocks nested deeper stay plain text; unset for no limit."""
    prefix_pages: int = 0
    """Pages kept for prompts that begin alike, as those with one few-shot header do; 0 keeps none."""
    cuda_graphs: bool = True
    """On a GPU, replay steps of few tokens as CUDA graphs; false runs every step call by call."""
    overlap: bool | None = None
    """Plan each step while the device runs the one before it; unset does so where CUDA graphs run. The answers are the
    same; forks and joins begin one step later."""
    debug: bool = False
    """Fill freed pages with NaN and check the page books after every step."""

    def __post_init__(self) -> None:
        for name in ("page_size", "max_rows", "max_step_tokens"):
            _check(getattr(self, name) >= 1, f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("num_pages", "prefix_pages"):
            _check(getattr(self, name) >= 0, f"{name} must not be negative, got {getattr(self, name)}")
        for name in ("max_paths", "max_depth"):
            value = getattr(self, name)
            _check(value is None or value >= 0, f"{name} must not be negative (unset for no limit), got {value}")


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How one answer is drawn, and where it ends.

    Raises:
        GenerationError: a value out of range; the message names the field.
    """

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
    """Same seed, prompt and settings: same answer, whatever else runs, up to rounding: products of other
    sizes round differently, which in bf16 often changes which of two nearly equal tokens is drawn, in float64 never in
    practice."""
    max_concurrent_branches: int | None = None
    """Most branches of the answer that run at once; 1 decodes path after path with the same result."""
    stop_token_ids: tuple[int, ...] = ()
    """Further ids that end the answer, outside of paths; like the end-of-document id they are not part of it. Structure
    tags are refused: `</Goal>` among them, for example, would end every answer before its first fork."""
    ignore_eos: bool = False
    """Treat the end-of-document id as text, so that answers get as long as max_tokens."""

    def __post_init__(self) -> None:
        # One Python type each: a list could change while the request waits, and numpy's integers print otherwise.
        object.__setattr__(self, "seed", whole_number("seed", self.seed))
        stop = tuple(whole_number("stop_token_ids", token) for token in self.stop_token_ids)
        object.__setattr__(self, "stop_token_ids", stop)
        _check(self.max_tokens >= 1, f"max_tokens must be at least 1, got {self.max_tokens}")
        for name in ("max_critical_tokens", "max_concurrent_branches"):
            value = getattr(self, name)
            _check(value is None or value >= 1, f"{name} must be at least 1, or unset for no limit, got {value}")
        _check(0 <= self.temperature < float("inf"), f"temperature must be finite and >= 0, got {self.temperature}")
        _check(self.top_k >= 0, f"top_k must be >= 0 (0 is off), got {self.top_k}")
        _check(0 < self.top_p <= 1, f"top_p must lie in (0, 1], got {self.top_p}")


def whole_number(name: str, value: SupportsIndex) -> int:
    """`value` as a plain int.

    Raises:
        GenerationError: it is no integer, of Python, numpy or torch; the message says `name`.
    """
    try:
        return int(operator.index(value))
    except TypeError as error:
        raise GenerationError(f"{name} takes whole numbers, got {value!r}") from error


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise GenerationError(message)
