"""Ranks that hold the others up are named: a throttled GPU or a slow disk costs all ranks its delay at every step."""

from __future__ import annotations

import logging
import socket
import statistics
from collections.abc import Mapping, Sequence

from megatron_multiverse.parallel.ranks import Ranks

logger = logging.getLogger(__name__)

FEWEST_STEPS = 10
"""Steps that are compared at least: over fewer, ranks differ by the rows they got."""


class Stragglers:
    """Compares, at log steps, how long the ranks take where they do not wait for each other.

    Compared are the wait for data and the forward passes. Backward passes and the rest of a step reduce gradients, in
    which the fast ranks wait for the slow one, so that all look alike. Ranks that compute one forward pass together
    (tensor and context parallel ones, and with ZeRO 3 all) look alike, too: a slow one among them shows as all of them,
    beside the other replicas of the model. A pipeline stage is compared with the same stage of other replicas, since
    stages differ by design.

    Every rank builds one and calls it at the same steps.

    Args:
        ranks: of the run.
        percent: above the median from which a rank is named; 0 never compares.
    """

    def __init__(self, ranks: Ranks, percent: float) -> None:
        self._ranks, self._percent = ranks, percent if ranks.size > 1 else 0.0
        self._steps, self._seconds = 0, 0.0
        self._last_step: int | None = None
        self._names: list[tuple[str, int]] = []
        if self._percent:
            self._names = ranks.gather((socket.gethostname(), _pipeline_stage()))

    def look(self, step: int, numbers: Mapping[str, float | None]) -> None:
        """Count an interval, and warn on the first rank if a rank is slow.

        Gathers one number of each rank, once in ten steps at most.
        The first interval does not count: kernels are compiled in it, on some ranks longer than on others.

        Args:
            step: the last one.
            numbers: of this rank, from `StepMeter.read`.
        """
        before, self._last_step = self._last_step, step
        if not self._percent or before is None:
            return
        self._steps += step - before
        self._seconds += (step - before) * sum(numbers.get(name) or 0.0 for name in ("data_wait_s", "forward_s"))
        if self._steps < FEWEST_STEPS:
            return
        gathered = self._ranks.gather_to_first(self._seconds / self._steps)
        self._steps, self._seconds = 0, 0.0
        if gathered and (note := straggler_note(gathered, self._names, self._percent)):
            logger.warning("step %d: %s", step, note)


def straggler_note(seconds: Sequence[float], names: Sequence[tuple[str, int]], percent: float) -> str | None:
    """Which rank is the slowest, if it is so slow that it should be looked at.

    Args:
        seconds: per step, of each rank.
        names: host and pipeline stage of each rank.
        percent: above the median of its stage from which a rank is slow.
    """
    medians = {
        stage: statistics.median(s for s, (_, other) in zip(seconds, names, strict=True) if other == stage)
        for stage in {stage for _, stage in names}
    }
    above = [100 * (s / max(medians[stage], 1e-9) - 1) for s, (_, stage) in zip(seconds, names, strict=True)]
    slowest = max(range(len(above)), key=above.__getitem__)
    if above[slowest] <= percent:
        return None
    host, stage = names[slowest]
    return (
        f"rank {slowest} on {host} is slow: {seconds[slowest]:.3g} s a step for data and forward passes, "
        f"{above[slowest]:.0f} % above the median of {medians[stage]:.3g} s; look at its GPU's clock and temperature, "
        "at its disk, and at other programs there"
    )


def _pipeline_stage() -> int:
    from megatron.core import parallel_state

    return int(parallel_state.get_pipeline_model_parallel_rank()) if parallel_state.is_initialized() else 0
