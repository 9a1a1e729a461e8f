"""Timing of rivals that take turns.

Matrix products run at the GPU's power limit, so the clock rate depends on what ran before: a kernel timed directly
after one that draws less power looks up to 15 % faster. So every kernel warms up itself, and the order is random in
each round.
"""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Callable, Sequence
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
    calls: int = 1
    """How often `run` is called between two events; the time is that of one call."""
    after_wait: bool = False
    """Launch the calls while a kernel that only waits keeps the GPU busy. Short calls take longer to launch than to
    run, and in a real program they wait in the queue, too."""

    @classmethod
    def of(cls, call: Callable[[], Any], *, calls: int = 1) -> Step:
        """A step without preparation."""
        return cls(lambda _: call(), calls=calls)

    def __call__(self) -> None:
        self.run(self.prepare())


def captured(calls: Sequence[Callable[[], Any]]) -> torch.cuda.CUDAGraph:
    """A CUDA graph of these calls, one after the other; its replay has no gaps in which the host launches them."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        calls[0]()  # what the first call compiles must not be recorded
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph


def in_turns(steps: dict[str, Step], rounds: int) -> dict[str, float]:
    """Median time in ms of each step; they take turns in random order, and each turn begins with a warm-up."""
    expected = {}
    for name, step in steps.items():
        step()
        expected[name] = _read(_timed(step)) * step.calls
    order, rng = list(steps), random.Random(0)
    times: dict[str, list[Any]] = {name: [] for name in steps}
    for _ in range(rounds):
        rng.shuffle(order)
        for name in order:
            torch.cuda.synchronize()  # the queue of the step before must not delay this one
            for _ in range(math.ceil(WARM_UP / expected[name] * steps[name].calls)):
                steps[name]()
            times[name] += [_timed(steps[name]) for _ in range(math.ceil(MEASURED / expected[name]))]
    return {name: statistics.median(map(_read, timed)) for name, timed in times.items()}


def _timed(step: Step) -> tuple[Any, Any, int]:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    given = [step.prepare() for _ in range(step.calls)]
    if step.after_wait:
        torch.cuda._sleep(2_000_000)
    start.record()
    for one in given:
        step.run(one)
    end.record()
    return start, end, step.calls


def _read(timed: tuple[Any, Any, int]) -> float:
    start, end, calls = timed
    end.synchronize()
    return float(start.elapsed_time(end)) / calls


def matmul_rate() -> float:
    """TFLOP/s of an 8192^3 bfloat16 product on random numbers."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2 * 8192**3 / 1e9 / in_turns({"matmul": Step.of(lambda: a @ b)}, 3)["matmul"]
