"""Settings of an engine. Imports no torch.

Frozen; it checks itself. Tools read it nested (``--engine.page-size 64``). What one request asks for: `sampling.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_multiverse.config.choices import Quantization
from megatron_multiverse.config.sampling import SamplingParams, refuse_unless
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
    """Pages of the cache, page_size * num_pages tokens in all; 0 takes enough for eight of the longest answers, on a
    GPU no more than fit beside the model."""
    max_rows: int = 64
    """Branches per step."""
    max_step_tokens: int = 8192
    """Tokens per step beyond one per row: prompts enter the steps of what decodes in chunks that fit. Fewer keep what
    decodes from waiting for them, more read them sooner (docs/engine.md)."""
    token_latency_target_ms: float | None = None
    """How long a step, so each next token, should take at most. Requests bring further branches, and longer chunks of
    prompts, only while the step is predicted to end in time; unset, as many as max_rows and max_step_tokens allow."""
    max_paths: int | None = 64
    """Goals with more outlines stay plain text; unset for no limit."""
    max_depth: int | None = MAX_DEPTH
    """Blocks nested deeper stay plain text; unset for no limit."""
    prefix_cache: bool = True
    """Requests that begin alike share what was computed for their beginning. It lies in pages that nothing else needs,
    so it takes no room."""
    cuda_graphs: bool = True
    """On a GPU, replay steps of few tokens as CUDA graphs; false runs every step call by call."""
    overlap: bool | None = None
    """Plan each step while the device runs the one before it; unset does so where CUDA graphs run. The answers are the
    same; forks and joins begin one step later."""
    round_as_trained: bool = False
    """In half precision, round after each product, norm and gate as the layers of the trainer do, instead of once where
    a kernel does several of them: log-probabilities come closer to the trainer's, steps take a little longer."""
    quantization: Quantization = "none"
    """fp8: the weights of attention and MLP are rounded to eight bits, with a scale for each row, when the engine is
    made, which halves their memory; activations and cache keep their format. Steps of up to 32 rows take less time,
    larger ones more (docs/engine.md). One rank; the model serves engines alone then, and new weights are copied into it
    (`model.weights.copy_weights`)."""
    debug: bool = False
    """Fill freed pages with NaN and check the page books after every step."""

    def __post_init__(self) -> None:
        for name in ("page_size", "max_rows", "max_step_tokens"):
            refuse_unless(getattr(self, name) >= 1, f"{name} must be at least 1, got {getattr(self, name)}")
        refuse_unless(self.num_pages >= 0, f"num_pages must not be negative, got {self.num_pages}")
        target = self.token_latency_target_ms
        refuse_unless(
            target is None or 0 < target < float("inf"),
            f"token_latency_target_ms must be finite and above 0 (unset for none), got {target}",
        )
        for name in ("max_paths", "max_depth"):
            value = getattr(self, name)
            refuse_unless(value is None or value >= 0, f"{name} must not be negative (unset for no limit), got {value}")

    def pages_for(self, longest: int, answers: int = 8) -> int:
        """Pages for so many answers of `longest` tokens, prompt included, and their forks."""
        return answers * (-(-longest // self.page_size) + 16)

    def limits_of(self, sampling: SamplingParams) -> dict[str, int | None]:
        """`max_depth` and `max_paths` of an answer: the smaller ones of the engine's and the request's, None where
        neither has a limit."""
        pairs = {name: (getattr(self, name), getattr(sampling, name)) for name in ("max_depth", "max_paths")}
        return {name: min((limit for limit in pair if limit is not None), default=None) for name, pair in pairs.items()}
