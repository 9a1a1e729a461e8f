"""The dry run: a run is looked at without a GPU, and what it would need adds up."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import distributed

from benchmarks.rl_shared_prefix import Options, answer, shape_of
from megatron_multiverse.cli import parse_options
from megatron_multiverse.config import (
    CheckpointConfig,
    EngineConfig,
    PolicyConfig,
    RewardConfig,
    RLConfig,
    RolloutConfig,
    SamplingParams,
    TaskConfig,
)
from megatron_multiverse.data.tokenizers import build_tokenizer
from megatron_multiverse.errors import CheckpointError, ConfigError
from megatron_multiverse.model.gpt import build_gpt_model
from megatron_multiverse.parallel.ranks import Ranks
from megatron_multiverse.rl import trainer
from megatron_multiverse.rl.drawing import drawing_of
from megatron_multiverse.rl.dry_run import beside, logits_of_targets, report
from megatron_multiverse.rl.prompts import Prompts
from megatron_multiverse.rl.replica import Replica
from megatron_multiverse.rl.rewards import Graded
from megatron_multiverse.rl.rollout import Rollouts
from megatron_multiverse.rl.trial import summary, try_steps
from megatron_multiverse.training.memory import GIB, Beside, StateBytes, estimate, state_bytes
from megatron_multiverse.training.memory_report import counted
from megatron_multiverse.training.start import create_model
from tests.forked import run_forked

from .runs import SHAPE, TOKENIZER, make_start, metrics, run_config

ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def no_process_group() -> None:
    """An estimate pretends to be one of many ranks; models of other tests leave a group of one rank in this process."""
    no_group()


def no_group() -> None:
    if distributed.is_initialized():
        distributed.destroy_process_group()


def nothing(answer: Graded) -> float:
    return 0.0


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_start(tmp_path_factory.mktemp("start"))


def bytes_of(run: RLConfig, longest: int = 40) -> dict[str, int]:
    no_group()  # of a model of this test
    return {part.name: part.size for part in beside(run, SHAPE, longest).parts}


@pytest.mark.parametrize("dtype", ["float32", "bf16"])
@pytest.mark.parametrize("quantization", ["none", "fp8"])
def test_engine_and_cache_take_what_was_said(start: Path, tmp_path: Path, dtype: Any, quantization: Any) -> None:
    rollout = RolloutConfig(
        prompts_per_step=2, group_size=2, sampling=SamplingParams(max_tokens=12, temperature=1.0),
        engine=EngineConfig(max_rows=48, quantization=quantization),
    )  # fmt: skip
    run = run_config(start, tmp_path, dtype=dtype, rollout=rollout)
    tokenizer = build_tokenizer("HuggingFaceTokenizer", TOKENIZER)
    prompts = Prompts(run.task, tokenizer, run.seed)
    model, layers = create_model(run.train_config(), SHAPE, torch.device("cpu"))
    drawing = drawing_of(run, SHAPE, tokenizer, prompts, 1)
    rollouts = Rollouts(run, model, SHAPE, layers, tokenizer, drawing, Replica(Ranks()))
    rollouts.use_weights(0)
    assert rollouts._engine is not None
    played, store = rollouts._played, rollouts._engine.runner.store
    said = bytes_of(run, prompts.longest + 12)
    assert said["cache"] == store.keys.nbytes + store.values.nbytes
    assert ("engine" in said) == (played is not model)
    if "engine" in said:
        assert said["engine"] == sum(tensor.nbytes for tensor in [*played.parameters(), *played.buffers()])
    rollouts.close()


def test_an_update_takes_what_was_measured() -> None:
    """Recorded peaks of PyTorch's allocator on one GPU, a row an answer and a row for all; the document says so."""
    said = []
    rows = [json.loads(line) for line in (ROOT / "benchmarks/results/rl_shared_prefix_h200.jsonl").open()]
    assert len(rows) == 2
    o = Options()
    model = shape_of(o)
    drawn = len(answer(o, np.zeros(o.prompt, np.int64), model.vocab_size, 1).targets.contexts)
    for row in rows:
        answers, length = 1 if row["prompt"] == "per answer" else o.group_size, int(row["rows"].split(" x ")[1])
        run = RLConfig(
            init_from="none", task=TaskConfig(input="none"), checkpoint=CheckpointConfig(save="none"), dtype="bf16",
            policy=PolicyConfig(seq_length=length),
        ).train_config()  # fmt: skip
        (stage,) = estimate(run, model, Beside(logits_of_targets(run, model, answers * drawn)))
        assert 0 < row["peak_gib"] - stage.total / GIB < 0.5, (row, stage)
        said.append(f"{stage.total / GIB:.1f}")
    assert f"it says {' and '.join(said)}." in (ROOT / "docs/rl.md").read_text(encoding="utf-8")


def test_one_process_keeps_float32_weights(start: Path, tmp_path: Path) -> None:
    def state(**changes: Any) -> StateBytes:
        return state_bytes(run_config(start, tmp_path, **changes).train_config())

    assert state(dtype="bf16") == StateBytes((4 + 2, 1), (4, 1), (8, 1))
    assert state(dtype="float32") == StateBytes((4, 1), (4, 1), (8, 1))
    assert state(dtype="float64") == StateBytes((8, 1), (8, 1), (16, 1))
    rounding = RolloutConfig(engine=EngineConfig(round_as_trained=True))
    assert state(dtype="bf16", rollout=rounding) == StateBytes((2, 1), (4, 1), (12, 1))


def test_a_reference_and_a_cache_that_is_given_back(start: Path, tmp_path: Path) -> None:
    run = run_config(start, tmp_path)
    parameters = sum(weight.numel() for weight in build_gpt_model(SHAPE).parameters())
    apart = run_config(start, tmp_path, policy=dataclasses.replace(run.policy, kl_coef=0.1))
    assert bytes_of(apart)["reference"] == 4 * parameters and "reference" not in bytes_of(run)
    for pages in (3, 10**6):  # less than the activations take, and more
        engine = dataclasses.replace(run.rollout.engine, num_pages=pages)
        kept, given_back = (
            dataclasses.replace(run, rollout=dataclasses.replace(run.rollout, engine=engine, free_cache=free))
            for free in (False, True)
        )
        (all_at_once,), (in_turns,) = (
            estimate(one.train_config(), SHAPE, beside(one, SHAPE, 40)) for one in (kept, given_back)
        )
        update, cache = all_at_once.activations + all_at_once.logits, all_at_once.beside
        assert all_at_once.total - in_turns.total == min(update, cache)


def test_the_script_looks_at_a_run_and_leaves_nothing(start: Path, tmp_path: Path) -> None:
    script = ROOT / "pretrain_scripts/rl_multiverse.py"
    config = {
        "init_from": str(start / "model"), "task": {"input": str(start / "rows.jsonl")},
        "checkpoint": {"save": str(tmp_path / "run")}, "policy": {"seq_length": 96}, "reward": {"correct": "exact"},
        "rollout": {"sampling": {"max_tokens": 12, "temperature": 1.0}}, "parallel": {"tensor_model_parallel_size": 2},
    }  # fmt: skip
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))

    def run(*options: str) -> subprocess.CompletedProcess[str]:
        command = [script, "--config", tmp_path / "run.yaml", "--dry-run", *options]
        return run_forked(*command, env=os.environ | {"WORLD_SIZE": "4"})

    done = run()
    assert done.returncode == 0 and "transformer layers" not in done.stderr, done.stderr
    prompts, steps, ranks, *_ = done.stdout.splitlines()
    assert re.fullmatch(r".*rows\.jsonl: 20 prompts, the longest of \d+ tokens", prompts)
    assert steps.startswith("100 steps: each draws 16 x 8 answers of at most 12 tokens and makes 1 update of them")
    assert ranks == f"{SHAPE.num_parameters:,} parameters on 4 ranks: tensor 2 x 2 replicas"
    assert re.search(r"\n  cache +[\d.]+ GiB = .*\n  together +[\d.]+ GiB\n", done.stdout), done.stdout
    assert "on GPUs of 80 GB: fits without recompute" in done.stdout and not (tmp_path / "run").exists()
    absent = run("--init-from", str(tmp_path / "none"))
    assert absent.returncode == 1 and "or name its published shape, as in --dry-run-shape qwen2.5-7b" in absent.stderr


def test_parameters_are_counted_in_what_can_be_read() -> None:
    assert [counted(count) for count in (18_432, 3_601_000, 7_620_000_000)] == ["18,432", "3.6 million", "7.62 billion"]
    assert counted(95_000_000) == "95.0 million" and counted(494_000_000, 3) == "0.494 billion"


def test_what_would_end_the_run_ends_the_dry_run(start: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no reward 'none'"):
        report(run_config(start, tmp_path, reward=RewardConfig(correct="none")))
    with pytest.raises(ConfigError, match=r"rollout\.sampling\.max_tokens .* more than policy\.seq_length 20"):
        report(run_config(start, tmp_path, policy=PolicyConfig(seq_length=20)))
    with pytest.raises(CheckpointError, match="--dry-run-shape"):
        report(run_config(start, tmp_path, init_from=str(tmp_path)))


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"engine": EngineConfig(num_pages=1)}, r"need \d+ cache slots, the engine has 16 \(1 pages of 16\); .* num_pages"),
    ({"sampling": SamplingParams(max_tokens=12, temperature=1.0, stop_token_ids=(999_999,))},
     r"a stop token is 999999, the ids of the vocabulary are 0 to \d+"),
    ({"sampling": SamplingParams(max_tokens=12, temperature=1.0, stop=("</Path>",))}, r"stop text '</Path>' ends in"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "refusal"), REFUSED)
def test_what_the_engine_would_refuse_ends_both_before_weights_are_loaded(
    start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], refusal: str
) -> None:
    run = run_config(start, tmp_path / "run")
    run = dataclasses.replace(run, rollout=dataclasses.replace(run.rollout, **changes))
    refusal = rf"rollout: the engine would refuse the longest prompt of .*rows\.jsonl: .*{refusal}"
    with pytest.raises(ConfigError, match=refusal):
        report(run)
    assert not (tmp_path / "run").exists()

    def loaded(*_: Any) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(trainer, "build_engine", loaded)
    with pytest.raises(ConfigError, match=refusal):
        trainer.train(run)


def test_a_folder_that_the_run_could_not_go_on_in_ends_the_dry_run(start: Path, tmp_path: Path) -> None:
    trainer.train(run_config(start, tmp_path, train_iters=2))
    no_group()
    before = sorted((path, path.stat().st_mtime_ns) for path in tmp_path.rglob("*"))
    with pytest.raises(ConfigError, match=r"is at step 2 already, beyond train_iters \(1\)"):
        report(run_config(start, tmp_path, train_iters=1))
    with pytest.raises(ConfigError, match=r"already holds a checkpoint \(step 2\) and checkpoint\.resume is false"):
        report(run_config(start, tmp_path, checkpoint=CheckpointConfig(save=str(tmp_path), resume=False)))
    assert "4 steps: each draws" in report(run_config(start, tmp_path, train_iters=4))
    assert sorted((path, path.stat().st_mtime_ns) for path in tmp_path.rglob("*")) == before


def test_tried_steps_are_the_first_of_the_run_and_leave_no_trace(start: Path, tmp_path: Path) -> None:
    run = run_config(start, tmp_path / "run", train_iters=9000)
    said = try_steps(run, 3)
    assert not (tmp_path / "run").exists()
    found = re.fullmatch(
        r"tried 3 steps: reward ([\d.]+), ([\d.]+)% right in the first, which took [\d.]+ s; ([\d.e-]+) s for each "
        r"other one: ([\d.e-]+) s weights, ([\d.e-]+) s rollouts, [\d.e-]+ s rewards, ([\d.e-]+) s training; (\d+) "
        r"tokens/s drawn, ([\d.]+) GiB on the fullest rank; all 9000 steps would take [\d:]+ .* as long",
        said,
    )
    assert found and 0 < float(found[8]) < 100 and int(found[7]) > 0, said
    assert all(float(found[k]) > 0 for k in (3, 5, 6)), "a step, its rollouts and its update take time"
    trainer.train(dataclasses.replace(run, train_iters=2))
    first = metrics(tmp_path / "run")[0]
    assert (f"{first['reward']:.3f}", f"{first['accuracy']:.1%}") == (found[1], f"{found[2]}%")
    settled = dataclasses.replace(run, reward=RewardConfig(correct="tests.unit.rl.test_dry_run:nothing"))
    assert try_steps(settled, 2).endswith("activations and optimizer, and the time is a lower bound")
    told = try_steps(run, 2)  # whatever the folder holds
    assert told.startswith(f"tried 2 steps: reward {found[1]}") and len(metrics(tmp_path / "run")) == 2


def test_what_is_said_of_tried_steps_follows_from_their_numbers() -> None:
    def step(targets: int, step_s: float, train_s: float) -> dict[str, Any]:
        times = {"step_time_s": step_s, "weights_s": 0.25, "rollout_s": 1.0, "reward_s": None, "train_s": train_s}
        return {"reward": 0.5, "accuracy": 0.25, "length": 10.0, "answers": 4, "targets": targets, **times}

    began = "reward 0.500, 25.0% right in the first, which took 9.0 s; "
    updated, idle = step(40, 4.0, 2.5), step(0, 2.0, 0.5)
    first = {**updated, "step_time_s": 9.0}
    assert summary([first, updated, updated], 1.5, 1000) == (
        f"tried 3 steps: {began}4 s for each other one: 0.250 s weights, 1.000 s rollouts, 0.000 s rewards, 2.500 s "
        "training; 40 tokens/s drawn, 1.50 GiB on the fullest rank; all 1000 steps would take 1:06:40 without "
        "checkpoints, if answers stay as long"
    )
    settled = "all answers to each prompt earned the same"
    mixed = summary([first, updated, idle], 1.5, 1000)
    assert f"{began}3 s for each other one (1 of them without an update: {settled}): 0.250 s weights" in mixed
    assert "1.500 s training; " in mixed and "would take 0:50:00 without" in mixed
    once = summary([first, idle], 1.5, 1000)
    assert f"one (1 of them without an update: {settled})" in once and "would take at least 0:33:20 without" in once
    never = summary([{**idle, "step_time_s": 9.0}, idle], 1.5, 1000)
    assert never == (
        f"tried 2 steps: {began}2 s for each other one: 0.250 s weights, 1.000 s rollouts, 0.000 s rewards, 0.500 s "
        "training; 40 tokens/s drawn, 1.50 GiB on the fullest rank; all 1000 steps would take at least 0:33:20 without "
        f"checkpoints, if answers stay as long; no step had an update ({settled}), so the memory is without gradients, "
        "activations and optimizer, and the time is a lower bound"
    )
    assert "lower bound" not in summary([{**idle, "step_time_s": 9.0}, updated], 1.5, 1000)


def test_the_script_tries_steps_after_it_has_looked(start: Path, tmp_path: Path) -> None:
    config = {
        "init_from": str(start / "model"), "task": {"input": str(start / "rows.jsonl")}, "device": "cpu",
        "checkpoint": {"save": str(tmp_path / "run")}, "policy": {"seq_length": 96}, "reward": {"correct": "exact"},
        "rollout": {"sampling": {"max_tokens": 12, "temperature": 1.0}, "prompts_per_step": 2, "group_size": 2},
    }  # fmt: skip
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))

    def run(*options: str) -> subprocess.CompletedProcess[str]:
        script = ROOT / "pretrain_scripts/rl_multiverse.py"
        return run_forked(script, "--config", tmp_path / "run.yaml", *options)

    done = run("--dry-run", "--dry-run-steps", "2")
    assert done.returncode == 0 and not (tmp_path / "run").exists(), done.stderr
    assert re.search(r"on GPUs of 141 GB: .*\ntried 2 steps: reward ", done.stdout), done.stdout
    assert "step 1/2 | reward " in done.stderr and "step 2/2 | reward " in done.stderr
    shape = run("--dry-run", "--dry-run-steps", "2", "--dry-run-shape", "qwen2.5-7b")
    assert shape.returncode == 1 and "gives the shape alone: leave one of them out" in shape.stderr


def test_a_published_shape_stands_for_a_model_that_is_not_here(start: Path, tmp_path: Path) -> None:
    absent = run_config(start, tmp_path, init_from=str(tmp_path / "none"), reward=RewardConfig(correct="exact"))
    told = report(absent, "qwen2.5-7b")
    assert "not read, since only the shape of the model is here" in told and "7.62 billion parameters" in told
    task = dataclasses.replace(absent.task, tokenizer_model=str(TOKENIZER))
    assert ": 20 prompts, " in report(dataclasses.replace(absent, task=task), "qwen2.5-7b")


def test_what_a_cache_that_is_given_back_brings_is_said() -> None:
    run = parse_options(RLConfig, ["--config", str(ROOT / "pretrain_scripts/configs/rl_quickstart.yaml")])
    told = report(run, "qwen2.5-1.5b").splitlines()
    assert "on GPUs of 80 GB: does not fit, however much is recomputed" in told
    (freed,) = (line for line in told if line.startswith("with rollout.free_cache true, "))
    shown = (ROOT / "docs/rl.md").read_text(encoding="utf-8")
    assert "\n".join(["```text", *(line for line in told if "on GPUs of " in line), "```"]) in shown
    assert "on GPUs of 80 GB: fits with the first " in freed and " of 28 layers recomputed" in freed
    freeing = dataclasses.replace(run, rollout=dataclasses.replace(run.rollout, free_cache=True))
    told = report(freeing, "qwen2.5-1.5b").splitlines()
    assert freed.removeprefix("with rollout.free_cache true, ") in told and "free_cache" not in " ".join(told)
