"""Where the time of a step goes: forward, backward, what is left of the gradients' reduction, optimizer.

Nothing here waits for the device but `PhaseClock.read`: on a GPU the phases are measured between CUDA events on the
current stream, elsewhere by the host's clock.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from functools import wraps
from itertools import pairwise
from typing import Any, ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")

Mark = tuple[str | None, Any]
"""The phase that begins, None if no phase does, and when: a CUDA event, or seconds of the host's clock."""


class PhaseClock:
    """Adds up the seconds that each phase of the steps since the last reading took on this rank.

    The engine names the phases; each lasts until the next one begins or the step ends. Those of all engines:

    - ``forward``: laying out the microbatches and the forward passes. What ranks of one model do together counts with
      its waiting: tensor and context parallel ranks, and ZeRO 3, which fetches weights.
    - ``backward``: the backward passes, with the reduction of gradients beside them. Also all that lies between two
      forward passes: in a pipeline, waiting for other stages.
    - ``grad_reduce``: what is left of the reduction of gradients after the last backward pass, waiting for slower ranks
      included. With megatron-core alone: one process has none, and DeepSpeed reduces within its backward pass.
    - ``optimizer``: gradient norm, clipping and update, and fetching the weights that other ranks updated.

    Reinforcement learning adds ``weights``, before the answers of a step are drawn: its engine takes over the weights.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self.reset()

    def reset(self) -> None:
        """Forget all steps until now."""
        self._seconds: dict[str, float] = {}
        self._step: list[Mark] = []
        self._ended: deque[list[Mark]] = deque()

    def begin(self, phase: str) -> None:
        """This phase of the step begins; the one before it ends."""
        self._step.append((phase, self._now()))

    def end(self) -> None:
        """The step ends."""
        self._step.append((None, self._now()))
        self._ended.append(self._step)
        self._step = []
        # Counted as soon as the device has done them, so that no more events are kept than it is behind.
        while self._ended and self._is_done(self._ended[0]):
            self._count(self._ended.popleft())

    def around_forward(self, function: Callable[P, R]) -> Callable[P, R]:
        """The same function, which is a forward pass: with it begins ``forward``, after it ``backward``."""

        @wraps(function, updated=())
        def timed(*args: P.args, **kwargs: P.kwargs) -> R:
            self.begin("forward")
            result = function(*args, **kwargs)
            self.begin("backward")
            return result

        return timed

    def read(self, steps: int) -> dict[str, float | None]:
        """Seconds per step as ``forward_s``, ``backward_s``, ...; then the next interval starts. Waits for the device.

        Args:
            steps: that ended since the last reading.
        """
        while self._ended:
            self._count(self._ended.popleft())
        found: dict[str, float | None] = {f"{phase}_s": s / max(1, steps) for phase, s in self._seconds.items()}
        self.reset()
        return found

    def _now(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        make: Any = torch.cuda.Event
        event = make(enable_timing=True)
        event.record()
        return event

    def _is_done(self, step: list[Mark]) -> bool:
        return not self._on_gpu or step[-1][1].query()

    def _count(self, step: list[Mark]) -> None:
        if self._on_gpu:
            step[-1][1].synchronize()
        for (phase, start), (_, end) in pairwise(step):
            if phase is not None:
                seconds = start.elapsed_time(end) / 1e3 if self._on_gpu else end - start
                self._seconds[phase] = self._seconds.get(phase, 0.0) + seconds
