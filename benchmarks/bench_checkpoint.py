"""How long a training run stands still for a checkpoint: one that it waits for, and one written beside the next steps.

    python -m benchmarks.bench_checkpoint --folder SCRATCH

Trains a fresh model of about 100 million parameters on the CPU, float32, with and without `checkpoint.async_save`, in
turns, and reads from metrics.jsonl what a checkpoint cost. Beside it stand a step before it and the one after it, while
files are written: writers take cores, too, and pages that training changes meanwhile are copied. All that is written is
deleted.
"""

from __future__ import annotations

import datetime
import json
import os
import shutil
import statistics
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.training_rows import PackedRows
from megatron_multiverse.checkpoints.run_files import METRICS_FILE
from megatron_multiverse.cli import parse_options, run_tool
from megatron_multiverse.config import TrainConfig
from megatron_multiverse.files import write_json_atomic
from megatron_multiverse.training.trainer import train

SAVE_INTERVAL, STEPS = 4, 7
"""The checkpoint of step 4 is looked at. That of the last step is waited for in either way."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to run."""

    folder: str
    """Scratch folder on the disk to be measured; two runs at a time lie there."""
    rounds: int = 3
    """Runs of each kind and engine."""
    num_layers: int = 12
    """Layers of 768 values."""
    tokens: int = 128
    """Tokens of a step."""
    output: str = ""
    """Write the figures here as JSON."""


def run(o: Options, engine: str, is_async: bool) -> dict[str, Any]:
    """Train, and say what its first checkpoint cost, in seconds."""
    folder = Path(o.folder) / f"{engine}_{'beside' if is_async else 'waiting'}"
    config = TrainConfig.from_dict(
        {
            "model": {
                "num_layers": o.num_layers, "hidden_size": 768, "ffn_hidden_size": 2048, "num_attention_heads": 12,
                "num_query_groups": 12, "kv_channels": 64, "vocab_size": 32768, "max_sequence_length": o.tokens,
                "share_embeddings_and_output_weights": True,
            },
            "data": {"data_prefixes": ["none"], "seq_length": o.tokens},
            "checkpoint": {"save": str(folder), "save_interval": SAVE_INTERVAL, "keep_last": 1, "async_save": is_async},
            "log": {"log_interval": 1}, "train_iters": STEPS, "engine": engine, "device": "cpu",
        }
    )  # fmt: skip
    train(config, PackedRows("packed", o.tokens, 32000, 0, 1))
    rows = [json.loads(line) for line in (folder / METRICS_FILE).read_text(encoding="utf-8").splitlines()]
    size = sum(file.stat().st_size for file in folder.glob("iter_*/*"))
    shutil.rmtree(folder)
    kinds = [row["kind"] for row in rows]
    saved = rows[kinds.index("checkpoint")]
    steps = {row["step"]: row["step_time_s"] for row in rows if row["kind"] == "train"}
    return {
        "engine": engine,
        "async_save": is_async,
        "parameters": rows[0]["parameters"],
        "gigabytes": size / 1e9,
        "wait_s": saved["wait_s"],
        "save_s": saved["save_s"],
        "step_s": statistics.median(steps[number] for number in range(2, SAVE_INTERVAL + 1)),
        "next_step_s": steps[SAVE_INTERVAL + 1],
    }


def measure(o: Options) -> dict[str, Any]:
    """All runs, and for each kind the medians."""
    kinds = [(engine, is_async) for engine in ("one_process", "megatron") for is_async in (False, True)]
    runs = [run(o, *kind) for _ in range(o.rounds) for kind in kinds]
    head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    found: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "commit": head,
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "command": "python -m benchmarks.bench_checkpoint --folder SCRATCH",
        "parameters": runs[0]["parameters"],
        "gigabytes": runs[0]["gigabytes"],
    }
    for engine, is_async in kinds:
        same = [row for row in runs if (row["engine"], row["async_save"]) == (engine, is_async)]
        names = ("wait_s", "save_s", "step_s", "next_step_s")
        values = {name: [row[name] for row in same] for name in names}
        medians = {name: statistics.median(value) for name, value in values.items()}
        found[f"{engine}_{'beside' if is_async else 'waiting'}"] = medians | {"wait_s_runs": values["wait_s"]}
    return found


def main() -> None:
    """Measure, print, and write if asked."""
    options = parse_options(Options)
    found = measure(options)
    print(json.dumps(found, indent=2))
    if options.output:
        write_json_atomic(options.output, found)


if __name__ == "__main__":
    run_tool(main)
