"""How long a step of a 7B model takes on one H200: fitted to measured points.

The points are medians of vLLM 0.26.0 with its defaults (bf16, random weights of Qwen2.5-7B's shape, full CUDA graphs,
chunks of up to 16,384 prompt tokens), measured on one H200 on 2026-11-27. Ours is close to it
(benchmarks/results/engine_h200.md); the question here is what follows for scheduling.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from megatron_multiverse.inference.step.plan import StepPlan


class Amounts(NamedTuple):
    """What a step computes."""

    rows: int
    """Branches."""
    read: int
    """Tokens in the cache that it reads, each once."""
    reread: int
    """Tokens that further branches see, which the GPU's L2 may still hold."""
    prompt: int
    """Tokens beyond one per row."""


@dataclass(frozen=True)
class Point:
    """A measurement."""

    amounts: Amounts
    milliseconds: float
    what: str


POINTS = (
    Point(Amounts(1, 1088, 0, 0), 4.72, "decode, 1K prompts, 128 new tokens, batch 1"),
    Point(Amounts(8, 8 * 1088, 0, 0), 4.93, "batch 8"),
    Point(Amounts(32, 32 * 1088, 0, 0), 5.37, "batch 32"),
    Point(Amounts(128, 128 * 1088, 0, 0), 7.28, "batch 128"),
    Point(Amounts(1, 16384 + 2048, 0, 0), 5.00, "one sequence after 16K, 4,096 new tokens"),
    Point(Amounts(8, 16384 + 8 * 264, 7 * 16384, 0), 5.84, "8 branches of 8 + 512 tokens after a 16K prefix"),
    Point(Amounts(8, 8 * (16384 + 264), 0, 0), 6.50, "8 unrelated contexts of 16K"),
    Point(Amounts(1, 1024, 0, 1023), 35.7, "first token of a 1K prompt"),
    Point(Amounts(1, 16384, 0, 16383), 442.0, "first token of a 16K prompt"),
)


class StepLaw:
    """Seconds of a step: a price per step, row, token read, token read again and prompt token.

    The prices are the least squares fit of the relative errors at `POINTS`.
    """

    def __init__(self) -> None:
        time = np.array([point.milliseconds / 1000 for point in POINTS])
        amounts = np.array([(1, *point.amounts) for point in POINTS], dtype=np.float64)
        self.prices = np.linalg.lstsq(amounts / time[:, None], np.ones(len(time)), rcond=None)[0]

    def seconds(self, amounts: Amounts) -> float:
        """How long a step takes."""
        return float(self.prices @ np.array([1, *amounts]))


def amounts_of(plan: StepPlan, num_pages: int) -> Amounts:
    """What a planned step computes."""
    rows, visible = len(plan.lengths), int(plan.lengths.sum())
    listed = np.bincount(plan.pages.ravel(), minlength=num_pages)[:num_pages]  # without the padding
    read = round(visible * np.count_nonzero(listed) / listed.sum())
    return Amounts(rows, read, visible - read, len(plan.ids) - rows)
