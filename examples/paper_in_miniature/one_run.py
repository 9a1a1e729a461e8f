"""One training run of the miniature and its evaluation; `miniature.py` starts one such process on each GPU."""

from __future__ import annotations

import logging
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import settings
import torch
from answers import Answerer, accuracy, problem_sets
from miniature import STOPPED

from megatron_multiverse.checkpoints.load import load_checkpoint
from megatron_multiverse.cli import parse_options, run_tool
from megatron_multiverse.files import write_json_atomic
from megatron_multiverse.model.weights import save_model
from megatron_multiverse.training.trainer import train


@dataclass(frozen=True, kw_only=True)
class OneRunOptions:
    """Which run."""

    name: str
    """As in settings.py."""
    output: Path
    """Folder of the miniature."""
    smoke: bool = False
    """The small size."""
    workers: int = 2
    """Processes that make training rows."""


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    options = parse_options(OneRunOptions)
    (options.output / "results").mkdir(parents=True, exist_ok=True)
    size = settings.SMOKE if options.smoke else settings.FULL
    rows, started = settings.runs()[options.name], time.perf_counter()
    weights = options.output / "models" / options.name
    training_folder = options.output / "training" / options.name
    if not weights.exists():
        config, loader = settings.training(size, rows, training_folder, options.workers)
        trained = train(config, loader)
        if trained.model_folder is None:
            raise SystemExit(STOPPED)
        model, shape = load_checkpoint(trained.model_folder)
        partial = weights.with_suffix(".partial")
        save_model(model, shape, partial, dtype=torch.bfloat16)
        partial.rename(weights)
    trained_s = time.perf_counter() - started
    sets = accuracy(Answerer(weights, rows.kind, size), problem_sets(size.problems))
    report = {
        "run": options.name,
        "rows": asdict(rows),
        "parameters": size.model.num_parameters,
        "steps": size.train_iters,
        "tokens": size.train_iters * size.rows * size.seq_length,
        "train_seconds": round(trained_s, 1),
        "seconds": round(time.perf_counter() - started, 1),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "torch": torch.__version__,
        "sets": sets,
    }
    write_json_atomic(options.output / "results" / f"{options.name}.json", report, indent=None)
    shutil.copy(training_folder / "metrics.jsonl", options.output / "results" / f"{options.name}.metrics.jsonl")
    shutil.rmtree(training_folder)  # with the state of the optimizer, ten times the weights
    for name, found in sets.items():
        print(f"{options.name} {name}: {sum(found['right'])} of {len(found['right'])} right", flush=True)


if __name__ == "__main__":
    run_tool(main)
