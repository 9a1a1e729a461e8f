"""A policy update on groups of answers that share their prompt: as trees with the prompt once, beside a row per answer.

Full-width layers of a published model, as many as fit, on answers with one block of four paths each. Both ways train
from the same weights on the same answers, so loss and gradient norm must agree; otherwise nothing is recorded.

    python -m benchmarks.rl_shared_prefix

Without a GPU `--tiny` runs the same with a model of a few thousand parameters and records nothing.
"""

from __future__ import annotations

import dataclasses
import gc
import logging
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.kernels.record import Recorder
from megatron_multiverse.cli import parse_options, run_tool
from megatron_multiverse.config import ModelConfig, PolicyConfig, TrainConfig
from megatron_multiverse.data.sft_dataset import Sample
from megatron_multiverse.model.device import choose_device
from megatron_multiverse.model.families import preset
from megatron_multiverse.rl.loss import PolicyLoss
from megatron_multiverse.rl.trees import Targets, Tree, join_trees, microbatches
from megatron_multiverse.structure import BlockSpan, Document, PathSpan, lay_out
from megatron_multiverse.training.one_process import OneProcessEngine
from megatron_multiverse.training.start import create_model

RESULTS = Path(__file__).parent / "results"
WARM_UP = 3
"""Updates that are not timed: kernels are compiled and buffers made."""
TOLERANCE = {"bf16": 2e-2, "float32": 1e-3}
"""Largest relative difference of loss and gradient norm between the two ways."""


@dataclass
class Options:
    """What to measure."""

    model: str = "qwen2.5-1.5b"
    """A published shape; model/families.py lists them."""
    num_layers: int = 8
    """Layers of it."""
    prompt: int = 4096
    """Tokens of the prompt."""
    answer: int = 1024
    """Tokens of each answer."""
    group_size: int = 16
    """Answers to the prompt."""
    updates: int = 8
    """Updates of each way; the first three are not timed."""
    dtype: str = "bf16"
    """bf16 or float32."""
    tiny: bool = False
    """A model and answers for a test without a GPU."""
    output: str | None = None
    """Folder of the results; default benchmarks/results."""
    commit: str | None = None
    """Commit to record; default that of the working tree."""


class NoDocuments:
    """See `training.microbatches.Documents`: the layout is given by labels."""

    tag_ids = None

    def sample_name(self, sample_id: int) -> str:
        """All answers are alike."""
        return "an answer of the benchmark"

    def sample_problem(self, sample_id: int) -> str | None:
        """It has none."""
        return None


def shape_of(o: Options) -> ModelConfig:
    """The model to train."""
    model = dataclasses.replace(preset(o.model), num_layers=o.num_layers)
    if o.tiny:
        model = dataclasses.replace(
            model, num_layers=2, hidden_size=64, ffn_hidden_size=96, num_attention_heads=4, num_query_groups=2,
            kv_channels=16, vocab_size=2048,
        )  # fmt: skip
    return model


def answer(o: Options, prompt: np.ndarray[Any, Any], vocab_size: int, number: int) -> Tree:
    """A prompt with random text after it, of which the middle half is a block of four paths."""
    rng = np.random.default_rng(number)
    ids = np.concatenate((prompt, rng.integers(0, vocab_size, o.answer)))
    goal, length = o.prompt + o.answer // 4, o.answer // 8
    paths = [PathSpan(goal + k * length, goal + (k + 1) * length, goal + k * length + 4) for k in range(4)]
    region_end = goal + 4 * length
    block = BlockSpan(o.prompt + 8, goal, paths, forced_end=region_end + 2, end=region_end + 4)
    layout = lay_out(Document(len(ids), o.prompt, [block]))
    targets = np.flatnonzero(layout.loss_mask())
    # A log-probability of random text under random weights, so that most ratios lie near 1.
    logprobs = np.full(len(targets), -np.log(vocab_size))
    advantages = np.full(len(targets), rng.normal())
    return Tree(Sample(ids, layout), Targets(targets - 1, ids[targets], logprobs, advantages))


def measure(o: Options, model: ModelConfig, *, share: bool) -> dict[str, Any]:
    """Train so many updates one way."""
    row_length = o.prompt + o.answer * (o.group_size if share else 1)
    row_length += -row_length % 128
    model = dataclasses.replace(model, max_sequence_length=max(model.max_sequence_length, row_length))
    config = TrainConfig.from_dict(
        {
            "model": dataclasses.asdict(model), "data": {"data_prefixes": ["none"], "seq_length": row_length},
            "checkpoint": {"save": "none"}, "optim": {"lr": 1e-5, "lr_decay_style": "constant"}, "dtype": o.dtype,
            "train_iters": o.updates,
        }
    )  # fmt: skip
    device = choose_device(config.device)
    network, layers = create_model(config, model, device)
    loss = PolicyLoss(PolicyConfig(), model.vocab_size, device)
    engine = OneProcessEngine(config, network, model, layers, NoDocuments(), loss=loss)
    prompt = np.random.default_rng(0).integers(0, model.vocab_size, o.prompt)
    trees = [answer(o, prompt, model.vocab_size, 1 + k) for k in range(o.group_size)]
    if share:
        trees = join_trees(trees, o.prompt, row_length)
    batches = microbatches(trees, row_length, 1, 0, seed=0, step=0)
    times, results = [], []
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with engine.running():
        for _ in range(o.updates):
            started = time.perf_counter()
            result = engine.step(batches)
            results.append((float(result.loss), float(result.grad_norm)))  # waits for the device
            times.append(time.perf_counter() - started)
    tokens = sum(batch["input_ids"].numel() for batch in batches)
    seconds = statistics.median(times[WARM_UP:])
    return {
        "rows": f"{len(batches)} x {row_length}",
        "backend": layers.attention_backend,
        "s_per_update": seconds,
        "answer_tokens_per_s": o.group_size * o.answer / seconds,
        "computed_tokens": tokens,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else 0.0,
        "loss": results[0][0],
        "grad_norm": results[0][1],
    }


def main() -> None:
    """Measure both ways in one run."""
    o = parse_options(Options)
    if o.tiny:
        o = dataclasses.replace(o, prompt=256, answer=64, group_size=4, updates=WARM_UP + 1, dtype="float32")
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s", stream=sys.stderr)
    model = shape_of(o)
    found = {}
    for share in (False, True):
        found[share] = measure(o, model, share=share)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    differing = {
        name: abs(found[True][name] / found[False][name] - 1)
        for name in ("loss", "grad_norm")
        if abs(found[True][name] / found[False][name] - 1) > TOLERANCE[o.dtype]
    }
    about = {
        "model": f"{o.model}, {model.num_layers} layers",
        "group": f"{o.group_size} answers of {o.answer} after {o.prompt}",
        "dtype": o.dtype,
    }
    slow = found[False]["s_per_update"]
    rows = [
        {**about, "prompt": "once" if share else "per answer", **values, "speedup": slow / values["s_per_update"]}
        for share, values in found.items()
    ]
    for row in rows:
        print(row, flush=True)
    if differing:
        sys.exit(f"NOT RECORDED: the two ways differ by {differing}")
    if torch.cuda.is_available() and not o.tiny:
        command = "python -m benchmarks.rl_shared_prefix"
        output = o.output or str(RESULTS)
        recorder = Recorder("rl_shared_prefix", output, o.commit, key=(*about, "prompt"), command=command)
        for row in rows:
            recorder.add(**row)
        recorder.table(
            "One policy update (forward, backward, optimizer) on a group of answers to one prompt, with a row per "
            f"answer and as one tree; median of {o.updates - WARM_UP} updates. Loss and gradient norm are those of the "
            "first update, from the same weights."
        )


if __name__ == "__main__":
    run_tool(main)
