"""A tiny model of the quickstart's vocabulary, prompts for it, and runs of seconds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_multiverse.config import (
    CheckpointConfig,
    EngineConfig,
    LogConfig,
    ModelConfig,
    OptimConfig,
    PolicyConfig,
    RewardConfig,
    RLConfig,
    RolloutConfig,
    SamplingParams,
    TaskConfig,
)
from megatron_multiverse.data.tokenizers import build_tokenizer
from megatron_multiverse.model.gpt import build_gpt_model
from megatron_multiverse.model.weights import save_model
from megatron_multiverse.rl.rewards import Graded

TOKENIZER = Path(__file__).parents[3] / "examples" / "quickstart" / "model"
SHAPE = ModelConfig(
    num_layers=1, hidden_size=32, ffn_hidden_size=64, num_attention_heads=2, num_query_groups=1, kv_channels=16,
    vocab_size=320, max_sequence_length=256,
)  # fmt: skip


def digits(answer: Graded) -> float:
    """Share of the most tokens that an answer may have which are digits: a toy task, which any model can learn."""
    return sum(character.isdigit() for character in answer.text) / 12


def make_start(folder: Path, shape: ModelConfig = SHAPE) -> Path:
    """A folder with a fresh model, its tokenizer, and prompts with answers."""
    save_model(build_gpt_model(shape, seed=4), shape, folder / "model")
    build_tokenizer("HuggingFaceTokenizer", TOKENIZER).save(folder / "model")
    rows = [{"prompt": f"Work out A = {k} + {k}.", "answer": f"A = {2 * k}"} for k in range(10, 30)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


def run_config(start: Path, save: Path, **changes: Any) -> RLConfig:
    """A run; `changes`: fields of RLConfig."""
    values: dict[str, Any] = {
        "init_from": str(start / "model"),
        "task": TaskConfig(input=str(start / "rows.jsonl")),
        "checkpoint": CheckpointConfig(save=str(save)),
        "reward": RewardConfig(correct="tests.unit.rl.runs:digits"),
        "rollout": RolloutConfig(
            prompts_per_step=6,
            group_size=6,
            sampling=SamplingParams(max_tokens=12, temperature=1.0),
            engine=EngineConfig(max_rows=48),
        ),
        "policy": PolicyConfig(seq_length=96, micro_batch_size=8),
        "optim": OptimConfig(lr=2e-2, lr_decay_style="constant"),
        "log": LogConfig(log_interval=1),
        "train_iters": 4,
        "device": "cpu",
    }
    return RLConfig(**{**values, **changes})


def metrics(save: Path, kind: str = "train") -> list[dict[str, Any]]:
    """What a run reported."""
    lines = (save / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]
