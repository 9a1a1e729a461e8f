"""Timing of rivals in turns.

Kernels of matrix products run at the GPU's power limit, and what ran before sets the clock: a kernel timed right after
one that draws less power looks up to 15 % faster. So every kernel warms up itself, and rounds go in random order.
"""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

WARM_UP, MEASURED = 25.0, 70.0
"""Milliseconds of a turn."""


@dataclass(frozen=True)
class Step:
    """Something to time: `run` on what `prepare` returns, which is not timed."""

    run: Callable[[Any], Any]
    prepare: Callable[[], Any] = lambda: None

    def __call__(self) -> None:
        self.run(self.prepare())


def in_turns(steps: dict[str, Step], rounds: int) -> dict[str, float]:
    """Median time in ms of each step; they take turns in random order, and each turn begins with a warm-up."""

    def timed(step: Step) -> tuple[Any, Any]:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        given = step.prepare()
        start.record()
        step.run(given)
        end.record()
        return start, end

    expected = {}
    for name, step in steps.items():
        step()
        start, end = timed(step)
        torch.cuda.synchronize()
        expected[name] = start.elapsed_time(end)
    order, rng = list(steps), random.Random(0)
    times: dict[str, list[tuple[Any, Any]]] = {name: [] for name in steps}
    for _ in range(rounds):
        rng.shuffle(order)
        for name in order:
            for _ in range(math.ceil(WARM_UP / expected[name])):
                steps[name]()
            times[name] += [timed(steps[name]) for _ in range(math.ceil(MEASURED / expected[name]))]
    torch.cuda.synchronize()
    return {name: statistics.median(start.elapsed_time(end) for start, end in x) for name, x in times.items()}


def matmul_rate() -> float:
    """TFLOP/s of an 8192^3 bfloat16 product on random numbers."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2 * 8192**3 / 1e9 / in_turns({"matmul": Step(lambda _: a @ b)}, 3)["matmul"]
