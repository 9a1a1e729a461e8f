"""Reinforcement learning over ranks is that of one process: the same answers, rewards and weights."""

from __future__ import annotations

import dataclasses
import os
import warnings
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch import Tensor

from megatron_multiverse.config import OptimConfig, ParallelConfig, PolicyConfig
from megatron_multiverse.errors import ConfigError
from megatron_multiverse.parallel.local_ranks import run_ranks
from megatron_multiverse.rl.trainer import train
from megatron_multiverse.rl.trial import try_steps
from tests.unit.rl.runs import SHAPE, make_start, metrics, run_config

from .runs import LIMIT_S

ANSWERS = (
    "reward",
    "accuracy",
    "length",
    "critical_length",
    "groups",
    "settled_groups",
    "answers",
    "targets",
    "prompts",
)
"""What the answers and rewards of a step are like; the same in every layout."""
Outcome = tuple[list[dict[str, Any]], dict[str, Tensor]]
"""Metrics and final weights of a run."""
UPDATES = ("loss", "grad_norm", "entropy", "clip_share")


def run(start: Path, save: Path, tensor: int, world_size: int) -> None:
    """What each rank does: three steps of two updates, which draw further prompts where all answers earned the same."""
    os.environ["WORLD_SIZE"] = str(world_size)
    warnings.filterwarnings("ignore", category=UserWarning, module="megatron")
    config = run_config(
        start,
        save,
        parallel=ParallelConfig(tensor_model_parallel_size=tensor),
        policy=PolicyConfig(seq_length=96, micro_batch_size=2, updates_per_step=2),
        optim=OptimConfig(lr=1e-3, lr_decay_style="constant"),
        train_iters=3,
    )
    train(dataclasses.replace(config, rollout=dataclasses.replace(config.rollout, prompts_per_step=3, group_size=3)))


def outcome(save: Path) -> Outcome:
    return metrics(save), load_file(save / "model" / "model.safetensors")


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    shape = dataclasses.replace(SHAPE, num_query_groups=2, vocab_size=321)  # which two ranks pad
    return make_start(tmp_path_factory.mktemp("start"), shape)


@pytest.fixture(scope="module")
def one_process(start: Path, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    folder = tmp_path_factory.mktemp("one")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WORLD_SIZE", "1")  # which the run sets
        run(start, folder, 1, 1)
    return outcome(folder)


@pytest.mark.parametrize(("tensor", "ranks"), [(1, 2), (2, 4)])
def test_ranks_learn_what_one_process_learns(
    start: Path, tmp_path: Path, one_process: Outcome, tensor: int, ranks: int
) -> None:
    """Two replicas of one rank, and two of two tensor parallel ranks each."""
    run_ranks(run, ranks, start, tmp_path, tensor, ranks, timeout=LIMIT_S)
    records, weights = outcome(tmp_path)
    wanted_records, wanted = one_process
    assert len(records) == len(wanted_records) == 3
    for record, reference in zip(records, wanted_records, strict=True):
        assert {name: record[name] for name in ANSWERS} == {name: reference[name] for name in ANSWERS}
        for name in UPDATES:
            assert record[name] == pytest.approx(reference[name], rel=1e-3, abs=1e-5)
        assert record["logprob_drift_max"] < 1e-4
        assert {"weights_s", "forward_s", "backward_s", "grad_reduce_s", "optimizer_s", "step_time_s"} <= record.keys()
    moved = max(float((wanted[name] - before).abs().max()) for name, before in first_weights(start).items())
    assert moved > 1e-3, "three steps do something"
    for name, weight in wanted.items():
        assert (weights[name] - weight).abs().max() < 1e-5, name


def tried(start: Path, save: Path) -> str:
    os.environ["WORLD_SIZE"] = "2"
    warnings.filterwarnings("ignore", category=UserWarning, module="megatron")
    return try_steps(run_config(start, save, parallel=ParallelConfig(tensor_model_parallel_size=2)), 2)


def test_ranks_try_steps_together(start: Path, tmp_path: Path) -> None:
    first, second = run_ranks(tried, 2, start, tmp_path / "run", timeout=LIMIT_S)
    assert first.startswith("tried 2 steps: reward 0.") and not (tmp_path / "run").exists()
    memory = [line.partition(" tokens/s drawn, ")[2].partition(";")[0] for line in (first, second)]
    assert memory[0] == memory[1], "of the fullest rank"


def first_weights(start: Path) -> dict[str, Tensor]:
    return load_file(start / "model" / "model.safetensors")


def test_what_cannot_be_spread_is_refused(start: Path, tmp_path: Path) -> None:
    for changes, words in (
        ({"context_parallel_size": 2}, "context_parallel_size must be 1"),
        ({"pipeline_model_parallel_size": 2}, "pipeline_model_parallel_size must be 1"),
        ({"tensor_model_parallel_size": 2, "sequence_parallel": True}, "sequence_parallel must be false"),
    ):
        with pytest.MonkeyPatch.context() as patch, pytest.raises(ConfigError, match=words):
            patch.setenv("WORLD_SIZE", "2")
            run_config(start, tmp_path, parallel=ParallelConfig(**changes))
