"""The loop: it learns, resumes bit for bit, keeps what it drew, and says what cannot work."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from megatron_multiverse.config import (
    CheckpointConfig,
    OptimConfig,
    ParallelConfig,
    PolicyConfig,
    RewardConfig,
    TaskConfig,
)
from megatron_multiverse.errors import CheckpointError, ConfigError, DataError, TrainingError
from megatron_multiverse.inference import from_record
from megatron_multiverse.model.gpt import build_gpt_model
from megatron_multiverse.model.weights import save_model
from megatron_multiverse.rl.rollout import Rollouts
from megatron_multiverse.rl.trainer import train
from megatron_multiverse.training import one_process
from megatron_multiverse.training.signals import StopSignals

from .runs import SHAPE, make_start, metrics, run_config

STEPS = int(os.environ.get("MULTIVERSE_RL_STEPS", "12"))
"""Steps of the runs that learn. `MULTIVERSE_RL_RUNS` names a folder to keep them in, with their rewards in
rewards.json: that is how benchmarks/results/rl_toy_cpu.json was made."""


TIMES = ("step_time_s", "weights_s", "rollout_s", "reward_s", "train_s")
"""What every step tells of its time."""


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_start(tmp_path_factory.mktemp("start"))


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    return Path(os.environ.get("MULTIVERSE_RL_RUNS", tmp_path))


@pytest.mark.parametrize("seed", range(3))
def test_rewards_rise_and_those_of_a_control_without_updates_do_not(start: Path, runs: Path, seed: int) -> None:
    rewards = {}
    for name, lr, steps in (("learns", 2e-2, STEPS), ("control", 1e-12, min(STEPS, 6) if STEPS < 20 else STEPS)):
        save = runs / f"{name}_{seed}"
        optim = OptimConfig(lr=lr, lr_decay_style="constant")
        train(run_config(start, save, seed=seed, optim=optim, train_iters=steps))
        rewards[name] = [record["reward"] for record in metrics(save)]
    if "MULTIVERSE_RL_RUNS" in os.environ:
        kept = runs / "rewards.json"
        known = json.loads(kept.read_text(encoding="utf-8")) if kept.exists() else {}
        known |= {f"{name}_{seed}": [round(reward, 4) for reward in values] for name, values in rewards.items()}
        kept.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
    before = rewards["control"]
    assert rewards["learns"][0] == before[0], "both begin with the same weights and noise"
    assert min(rewards["learns"][-3:]) > 3 * max(before)


def test_a_resumed_run_is_the_run_that_was_never_interrupted(start: Path, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"deterministic": True, "policy": PolicyConfig(seq_length=96, updates_per_step=2)}
    train(run_config(start, tmp_path / "whole", train_iters=4, **changes))
    train(run_config(start, tmp_path / "cut", train_iters=2, **changes))
    stopped = train(run_config(start, tmp_path / "cut", train_iters=4, **changes), stop=LateSignal())
    assert stopped.step < 4 and stopped.stopped_by == "SIGTERM" and stopped.model_folder is None
    train(run_config(start, tmp_path / "cut", train_iters=4, **changes))
    timed = {"time", *TIMES, "forward_s", "backward_s", "optimizer_s", "rollout_tokens_per_s", "memory_gib"}
    whole, cut = (
        [{name: value for name, value in record.items() if name not in timed} for record in metrics(tmp_path / name)]
        for name in ("whole", "cut")
    )
    assert whole == cut and len(whole) == 4 and any(record["targets"] for record in whole[2:])
    weights = [load_file(tmp_path / name / "model" / "model.safetensors") for name in ("whole", "cut")]
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())


def test_the_log_says_how_many_answers_a_budget_cut_off(
    start: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Answers without room earn nothing, and look like those of a model that has learned nothing."""
    with caplog.at_level("INFO"):
        train(run_config(start, tmp_path, train_iters=1))
    share = metrics(tmp_path)[0]["truncated"]
    assert share > 0 and f" | {share:.0%} cut off by a budget | " in caplog.text


def test_a_step_tells_where_its_time_went(start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each phase lasts 0.1 s longer than it takes here, so that it shows in its own number. The fourth step draws
    answers that all earn the same, and does not update."""
    draws = iter(range(4))

    def later(owner: Any, name: str) -> None:
        function = getattr(owner, name)

        def slow(*args: Any, **kwargs: Any) -> Any:
            time.sleep(0.1)
            return function(*args, **kwargs)

        monkeypatch.setattr(owner, name, slow)

    def draw(rollouts: Rollouts, *args: Any) -> Any:
        batch = drawn(rollouts, *args)
        if next(draws) == 3:
            batch.groups = [dataclasses.replace(group, rewards=np.zeros_like(group.rewards)) for group in batch.groups]
        return batch

    drawn = Rollouts.draw
    monkeypatch.setattr(Rollouts, "draw", draw)
    later(Rollouts, "use_weights")
    later(Rollouts, "_answer")
    later(Rollouts, "_grade")
    later(one_process, "clip_gradients")
    train(run_config(start, tmp_path, train_iters=4, policy=PolicyConfig(seq_length=96, updates_per_step=2)))
    *updated, settled = metrics(tmp_path)
    for row in updated:
        assert row["weights_s"] >= 0.1 and row["rollout_s"] >= 0.1 and row["reward_s"] >= 0.1 * row["groups"]
        assert row["optimizer_s"] >= 0.2 and row["forward_s"] > 0 and row["backward_s"] > 0
        assert row["train_s"] >= row["forward_s"] + row["backward_s"] + row["optimizer_s"]
    for row in (*updated, settled):
        assert sum(row[name] for name in TIMES[1:]) <= row["step_time_s"]
    assert settled["targets"] == 0 and "forward_s" not in settled and settled["weights_s"] >= 0.1


def test_engine_and_trainer_agree_on_every_token_in_float64(start: Path, tmp_path: Path) -> None:
    rollout = dataclasses.replace(run_config(start, tmp_path).rollout, keep_records=4)
    train(run_config(start, tmp_path, dtype="float64", rollout=rollout))
    records = metrics(tmp_path)
    assert all(record["logprob_drift_max"] < 1e-9 and record["ratio_far"] == 0 for record in records)
    kept = [json.loads(line) for line in (tmp_path / "rollouts.jsonl").read_text().splitlines()]
    assert len(kept) == 16 and [record["step"] for record in kept[::4]] == [1, 2, 3, 4]
    for record in kept:
        result = from_record(record)
        assert set(result.weight_versions) == {record["step"] - 1}
        assert {"reward", "correct", "advantage", "text", "gold"} <= record.keys()


def test_a_run_that_goes_on_keeps_each_answer_once(start: Path, tmp_path: Path) -> None:
    """A run that was killed after step 4 goes on from step 2, and what it kept of steps 3 and 4 is drawn again."""
    rollout = dataclasses.replace(run_config(start, tmp_path).rollout, keep_records=2)
    checkpoint = CheckpointConfig(save=str(tmp_path), save_interval=2)
    train(run_config(start, tmp_path, rollout=rollout, checkpoint=checkpoint))
    kept = tmp_path / "rollouts.jsonl"
    kept.write_text(kept.read_text(encoding="utf-8") + '{"step": 5, "prom', encoding="utf-8")
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("2\n", encoding="utf-8")
    train(run_config(start, tmp_path, rollout=rollout, checkpoint=checkpoint))
    steps = [json.loads(line)["step"] for line in kept.read_text(encoding="utf-8").splitlines()]
    assert steps == [1, 1, 2, 2, 3, 3, 4, 4]


def test_a_bf16_run_hands_its_weights_to_the_engine(start: Path, tmp_path: Path) -> None:
    rollout = dataclasses.replace(run_config(start, tmp_path).rollout, free_cache=True)
    train(run_config(start, tmp_path, dtype="bf16", rollout=rollout))
    drift = [record["logprob_drift"] for record in metrics(tmp_path)]
    assert max(drift) < 0.05, "the engine's copy follows the trained weights"


@pytest.mark.parametrize(("dtype", "free_cache"), [("float32", False), ("bf16", True)])
def test_rollouts_in_fp8_follow_the_weights_and_leave_them_as_they_are(
    start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: Any, free_cache: bool
) -> None:
    plain = run_config(start, tmp_path).rollout
    engine = dataclasses.replace(plain.engine, quantization="fp8")
    rollout = dataclasses.replace(plain, engine=engine, free_cache=free_cache)
    train(run_config(start, tmp_path, dtype=dtype, rollout=rollout))
    drift = [record["logprob_drift"] for record in metrics(tmp_path)]
    assert min(drift) > 1e-4 and max(drift) < 0.1, "rounded, and rounded anew after each step"
    begun, trained = (load_file(folder / "model" / "model.safetensors") for folder in (start, tmp_path))
    for name, weight in trained.items():
        assert weight.dtype == begun[name].dtype == torch.float32 and not torch.equal(weight, begun[name]), name
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="quantization fp8 runs on one rank"):
        run_config(start, tmp_path, rollout=rollout, parallel=ParallelConfig(tensor_model_parallel_size=2))


def test_an_engine_that_rounds_as_the_trainer_agrees_better_in_bf16(tmp_path: Path) -> None:
    """What is left comes from attention and products, whose sums are in another order: how much depends on the CPU."""
    start, shape = make_start(tmp_path), dataclasses.replace(SHAPE, num_layers=4)
    model = build_gpt_model(shape, seed=4)
    with torch.no_grad():
        for weight in model.parameters():
            weight *= 4 if weight.ndim == 2 else 1  # products large enough that their rounding counts
    save_model(model, shape, start / "model")
    drift = {}
    for rounds in (False, True):
        rollout = run_config(start, tmp_path).rollout
        rollout = dataclasses.replace(rollout, engine=dataclasses.replace(rollout.engine, round_as_trained=rounds))
        save = tmp_path / str(rounds)
        train(run_config(start, save, dtype="bf16", rollout=rollout, train_iters=2))
        drift[rounds] = [record["logprob_drift"] for record in metrics(save)]
    assert max(drift[True]) < 0.9 * min(drift[False])


def test_errors_name_the_settings_of_reinforcement_learning(start: Path, tmp_path: Path) -> None:
    """Its machinery is that of supervised training, whose `data.` and `add_control_tokens` it does not have."""
    with pytest.raises(ConfigError, match=r"^policy\.seq_length \(300\) must not exceed the model's .*\(256\)"):
        train(run_config(start, tmp_path / "run", policy=PolicyConfig(seq_length=300)))

    model, other = tmp_path / "model", tmp_path / "other"
    shutil.copytree(start / "model", model)
    backend = json.loads((model / "tokenizer.json").read_text())
    first, second = (token for token in backend["added_tokens"] if "Conclusion" in token["content"])
    first["content"], second["content"] = second["content"], first["content"]
    (shutil.copytree(model, other) / "tokenizer.json").write_text(json.dumps(backend))
    task = TaskConfig(input=str(start / "rows.jsonl"), tokenizer_model=str(other))
    with pytest.raises(ConfigError, match=r"in task\.tokenizer_model \(.*/other\): leave that out"):
        train(run_config(start, tmp_path / "run", task=task))

    first["content"], second["content"] = "<other>", "</other>"
    (model / "tokenizer.json").write_text(json.dumps(backend))
    with pytest.raises(ConfigError, match=r"lacks 2 of 12 structure tags.*Train it on Multiverse data first, with pre"):
        train(run_config(start, tmp_path / "run", init_from=str(model)))


def test_what_cannot_work_is_refused(start: Path, tmp_path: Path) -> None:
    def refuse(error: type[Exception], words: str, **changes: Any) -> None:
        with pytest.raises(error, match=words):
            train(run_config(start, tmp_path / "refused", **changes))

    refuse(ConfigError, "longest prompt", policy=PolicyConfig(seq_length=20))
    with pytest.raises(ConfigError, match=r"below train_iters x policy.updates_per_step \(4 x 2\)"):
        changes = {"optim": OptimConfig(lr_warmup_iters=8), "policy": PolicyConfig(updates_per_step=2)}
        run_config(start, tmp_path, **changes)
    refuse(ConfigError, "no reward 'exakt'", reward=RewardConfig(correct="exakt"))
    refuse(ConfigError, "cannot be imported", reward=RewardConfig(correct="tests.unit.rl.runs:nothing"))
    refuse(TrainingError, "raised ZeroDivisionError", reward=RewardConfig(correct="tests.unit.rl.test_trainer:broken"))
    refuse(
        DataError,
        "row 1: no text in column 'gold'",
        task=TaskConfig(input=str(start / "rows.jsonl"), answer_key="gold"),
    )
    refuse(
        ConfigError,
        "no default chat template: set it false",
        task=TaskConfig(input=str(start / "rows.jsonl"), chat=True),
    )
    refuse(ConfigError, "seed must not be negative, got -1", seed=-1)
    with pytest.raises(ConfigError, match=r"reward.extra format must be finite, got nan"):
        RewardConfig(extra={"format": float("nan")})
    train(run_config(start, tmp_path / "run", train_iters=1))
    with pytest.raises(CheckpointError, match="other prompts"):
        train(run_config(start, tmp_path / "run", train_iters=2, seed=99))
    rollout = run_config(start, tmp_path).rollout
    for changes in ({"temperature": 0.7}, {"top_p": 0.9}, {"min_tokens": 5}, {"logit_bias": {3: 1.0}}):
        with pytest.raises(ConfigError, match="distribution as it is"):
            dataclasses.replace(rollout, sampling=dataclasses.replace(rollout.sampling, **changes))
    with pytest.raises(ConfigError, match="resume"):
        save = CheckpointConfig(save=str(tmp_path / "run"), resume=False)
        train(run_config(start, tmp_path / "run", train_iters=2, checkpoint=save))


class LateSignal(StopSignals):
    """A signal that comes while answers are being drawn."""

    asked = 0

    def __bool__(self) -> bool:
        self.asked += 1
        self.received = "SIGTERM" if self.asked > 8 else None
        return self.received is not None


def broken(answer: Any) -> float:
    return 1 / 0
