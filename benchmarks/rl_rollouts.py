"""What reinforcement learning costs around the engine: a step's rollouts beside the bare engine on the same requests.

The rollouts of a run hand the weights over, draw and grade; the bare engine, built from the same checkpoint, only
answers. They take turns at the same prompts with the same seeds, so that after the first round both have compiled and
recorded all that these answers need. In float32 their answers must be the same tokens, otherwise nothing is recorded.

    python -m benchmarks.rl_rollouts --init-from runs/rl/sft/model --input runs/rl/rows/train.jsonl

The checkpoint and the prompts are those of examples/rl/run.sh.
"""

from __future__ import annotations

import json
import logging
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.kernels.record import Recorder
from megatron_multiverse.cli import parse_options, run_tool
from megatron_multiverse.config import RLConfig
from megatron_multiverse.data.tokenizers import build_tokenizer
from megatron_multiverse.dtypes import DTYPES
from megatron_multiverse.errors import TrainingError
from megatron_multiverse.inference import Request, Result, build_engine
from megatron_multiverse.model.device import choose_device
from megatron_multiverse.rl.drawing import drawing_of
from megatron_multiverse.rl.prompts import Prompts
from megatron_multiverse.rl.replica import Replica
from megatron_multiverse.rl.rollout import Rollouts
from megatron_multiverse.rl.trainer import build_engine as build_trainer
from megatron_multiverse.training.start import describe_model, joined_groups

RESULTS = Path(__file__).parent / "results"


@dataclass
class Options:
    """What to measure."""

    init_from: str
    """Checkpoint whose answers are drawn."""
    input: str
    """Prompts, as `task.input` of the run."""
    run_config: Path = Path("pretrain_scripts/configs/rl_quickstart.yaml")
    """All other settings of the run."""
    rounds: int = 6
    """Steps of either way; the first one, which compiles and records CUDA graphs, is not counted."""
    dtype: str = "bf16"
    """As in the run: bf16 or float32."""
    prompts_per_step: int = 16
    """Prompts of a step, with a group of answers each."""
    output: str | None = None
    """Folder of the results; default benchmarks/results."""
    commit: str | None = None
    """Commit to record; default that of the working tree."""


def run_config(o: Options) -> RLConfig:
    """The run whose rollouts are drawn."""
    changes = ["--init_from", o.init_from, "--task.input", o.input, "--dtype", o.dtype]
    changes += ["--rollout.prompts_per_step", str(o.prompts_per_step), "--rollout.max_resamples", "0"]
    return parse_options(RLConfig, ["--config", str(o.run_config), *changes])


def measure(o: Options) -> dict[str, Any]:
    """Tokens per second of both ways.

    Raises:
        TrainingError: they drew different tokens in float32.
    """
    config = run_config(o)
    base, device = config.train_config(), choose_device(config.device)
    model_config = describe_model(base)
    tokenizer = build_tokenizer(config.task.tokenizer_type, config.tokenizer_model)
    prompts = Prompts(config.task, tokenizer, config.seed)
    with joined_groups(base) as ranks:
        replica = Replica.of(ranks)
        trainer, model, _ = build_trainer(config, model_config, tokenizer, prompts)
        asked = drawing_of(config, model_config, tokenizer, prompts, replica.count)
        rollouts = Rollouts(config, model, model_config, trainer.layers, tokenizer, asked, replica)
        bare = build_engine(config.init_from, tokenizer, asked.engine, dtype=DTYPES[config.dtype], device=device)
        rates: dict[str, list[float]] = {"whole": [], "drawing": [], "bare": []}
        position = prompts.state_dict()
        requests = requests_of(config, prompts, rollouts)
        for step in range(o.rounds):
            prompts.load_state_dict(position)
            started = time.perf_counter()
            rollouts.use_weights(step)
            batch = rollouts.draw(prompts, step, lambda: False)
            whole = time.perf_counter() - started
            assert batch is not None
            bare.use_weights(step)  # of the last round's prompts nothing is kept there either
            started = time.perf_counter()
            answers = bare.generate(requests)
            alone = time.perf_counter() - started
            same = share_of_equals(batch.results, answers)
            if same < 1 and o.dtype == "float32":
                raise TrainingError(f"only {same:.1%} of the answers are those of the bare engine: not recorded")
            tokens = sum(len(answer.token_ids) for answer in batch.results)
            for name, seconds in (("whole", whole), ("drawing", batch.rollout_s)):
                rates[name].append(tokens / seconds)
            rates["bare"].append(sum(len(answer.token_ids) for answer in answers) / alone)
        rollouts.close()
    whole, drawing, alone = (statistics.median(rates[name][1:]) for name in ("whole", "drawing", "bare"))
    return {
        "tokens_per_s_bare": alone,
        "tokens_per_s_drawing": drawing,
        "tokens_per_s_whole": whole,
        "drawing_over_bare": drawing / alone,
        "whole_over_bare": whole / alone,
        "tokens": tokens,
        "same_answers": same,
    }


def requests_of(config: RLConfig, prompts: Prompts, rollouts: Rollouts) -> list[Request]:
    """The requests of a step, as the rollouts make them."""
    asked = [prompts.draw() for _ in range(config.rollout.prompts_per_step)]
    return [rollouts.request(number, prompt) for number, prompt in asked]


def share_of_equals(drawn: list[Result], answers: list[Result]) -> float:
    """Share of the answers that are the same tokens in both ways."""
    return sum(a.token_ids == b.token_ids for a, b in zip(drawn, answers, strict=True)) / len(answers)


def main() -> None:
    """Measure and record."""
    o = parse_options(Options)
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s", stream=sys.stderr)
    found = measure(o)
    print(json.dumps(found), flush=True)
    if torch.cuda.is_available():
        about = {"run": o.run_config.stem, "prompts": o.prompts_per_step, "dtype": o.dtype}
        recorder = Recorder(
            "rl_rollouts",
            o.output or str(RESULTS),
            o.commit,
            key=tuple(about),
            command="python -m benchmarks.rl_rollouts",
        )
        recorder.add(**about, **found)
        recorder.table(
            "Answers of a step, tokens per second: drawn by the bare engine, by the rollouts of a run, and with the "
            f"hand-over of weights and the grading of answers; medians of {o.rounds - 1} steps, in turns on the same "
            "requests. The number of tokens and the share of answers that are the same are those of the last step."
        )


if __name__ == "__main__":
    run_tool(main)
