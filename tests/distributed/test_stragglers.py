"""A rank that holds the other one up is named, by both engines, and nobody is named where all are alike."""

from __future__ import annotations

import importlib.util
import json
import os
import warnings
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed

from megatron_multiverse.parallel.local_ranks import run_ranks
from tests.clocks import CLOCKED, TestClock

from .runs import LIMIT_S, config

ENGINES: dict[str, dict[str, Any]] = {
    "megatron": {},
    "deepspeed": {"engine": "deepspeed", "deepspeed.zero_stage": 2, "layers.loss_chunk_tokens": None},
}


class RanksClock(TestClock):
    """The clock of a rank: it goes on where the rank is slow, and to that of the other rank where both have met."""

    def after(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The same function, at the end of which all ranks meet."""

        def meet(*args: Any, **options: Any) -> Any:
            result = function(*args, **options)
            latest = torch.tensor([self.now], dtype=torch.float64)
            distributed.all_reduce(latest, distributed.ReduceOp.MAX)
            self.now = float(latest)
            return result

        return meet


def train_slowly(data: Path, save: Path, slow: Collection[int], changes: dict[str, Any]) -> list[str]:
    """What each rank does: train, with 0.2 s more for each forward pass on the ranks that are slow; its warnings."""
    os.environ["WORLD_SIZE"] = "2"
    warnings.filterwarnings("ignore", category=UserWarning, module="megatron")
    from megatron_multiverse.training import megatron, pipeline, stragglers, zero
    from megatron_multiverse.training.trainer import train

    said: list[str] = []
    stragglers.FEWEST_STEPS = 2
    stragglers.logger.warning = lambda text, *values: said.append(text % values)
    clock = RanksClock(tick=0.001)
    for module in CLOCKED:
        module.time = clock  # type: ignore[assignment]
    # Where gradients are reduced, ranks wait for each other.
    megatron.finalize_model_grads = clock.after(megatron.finalize_model_grads)
    zero.reduced = clock.after(zero.reduced)
    if distributed.get_rank() in slow:
        place = pipeline.place

        def place_slowly(*args: Any) -> Any:
            clock.sleep(0.2)
            return place(*args)

        pipeline.place = zero.place = place_slowly
    # Two ranks differ from the mean of both by half of what they differ from each other.
    train(config(data, save, train_iters=5, eval_iters=1, **{"log.straggler_percent": 25.0}, **changes))
    return said


@pytest.mark.parametrize("engine", ENGINES)
def test_the_slow_rank_is_named(data: Path, tmp_path: Path, engine: str) -> None:
    if engine == "deepspeed" and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed")
    first, other = run_ranks(train_slowly, 2, data, tmp_path, [1], ENGINES[engine], timeout=LIMIT_S)
    assert len(first) == 2 and all("rank 1 on " in line for line in first), first  # of the steps 2, 3 and 4, 5
    assert other == []
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if row["kind"] == "train"][1:]
    for row in rows:  # the first rank waits in the reduction of gradients, which megatron-core tells apart
        assert row["forward_s"] < 0.2 and row["grad_reduce_s" if engine == "megatron" else "backward_s"] > 0.15
        phases = ("data_wait_s", "forward_s", "backward_s", "grad_reduce_s", "optimizer_s")
        assert sum(row.get(name, 0.0) for name in phases) <= row["step_time_s"]
        assert row["tokens_per_s"] == pytest.approx(2 * row["tokens_per_s_per_rank"])


def test_ranks_that_are_alike_are_not_named(data: Path, tmp_path: Path) -> None:
    assert run_ranks(train_slowly, 2, data, tmp_path, [0, 1], ENGINES["megatron"], timeout=LIMIT_S) == [[], []]
