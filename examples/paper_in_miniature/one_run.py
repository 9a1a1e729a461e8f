"""One training run of the miniature and its evaluation; `miniature.py` starts one such process on each GPU."""

from __future__ import annotations

import json
import logging
import shutil
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import settings
import torch
from answers import Answerer, accuracy, problem_sets
from miniature import STOPPED
from official_mask import two_labels
from training_rows import RowConfig

from megatron_multiverse.checkpoints.load import load_checkpoint
from megatron_multiverse.cli import parse_options, run_tool
from megatron_multiverse.files import write_json_atomic
from megatron_multiverse.model.weights import save_model
from megatron_multiverse.training.trainer import train

logger = logging.getLogger(__name__)


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
    attention_backend: str = "auto"
    """As in `config/layers.py`."""


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    options = parse_options(OneRunOptions)
    results = options.output / "results"
    results.mkdir(parents=True, exist_ok=True)
    size = settings.SMOKE if options.smoke else settings.FULL
    rows, metrics = settings.runs()[options.name], results / f"{options.name}.metrics.jsonl"
    weights = options.output / "models" / options.name
    started, training_s = time.monotonic(), None
    if not weights.exists():
        train_one(options, size, rows, weights, metrics)
        training_s = round(time.monotonic() - started, 1)
        logger.info("trained in %.0f s", training_s)
    started = time.monotonic()
    sets = accuracy(Answerer(weights, rows.kind, size), problem_sets(size.problems, rows))
    report = {
        "run": options.name,
        "rows": asdict(rows),
        "parameters": size.model.num_parameters,
        "steps": size.train_iters,
        "tokens": size.train_iters * size.rows * size.seq_length,
        **read_metrics(metrics),
        "training_s": training_s,
        **settings.measured_on(),
        "evaluation_s": round(time.monotonic() - started, 1),
        "sets": sets,
    }
    write_json_atomic(results / f"{options.name}.json", report, indent=None)
    for name, found in sets.items():
        print(f"{options.name} {name}: {sum(found['right'])} of {len(found['right'])} right", flush=True)


def train_one(options: OneRunOptions, size: settings.Size, rows: RowConfig, weights: Path, metrics: Path) -> None:
    """Train, or go on training. What stays is the metrics and, in bf16, the weights: a twelfth of the training state.

    Raises:
        SystemExit: a signal stopped it; the training state stays.
    """
    folder = options.output / "training" / options.name
    config, loader = settings.training(size, rows, folder, options.workers, options.attention_backend)
    with two_labels() if rows.official_mask else nullcontext():
        trained = train(config, loader)
    if trained.model_folder is None:
        raise SystemExit(STOPPED)
    model, shape = load_checkpoint(trained.model_folder)
    partial = weights.with_name(f"{weights.name}.partial")
    save_model(model, shape, partial, dtype=torch.bfloat16)
    shutil.copy(folder / "metrics.jsonl", metrics)
    partial.rename(weights)
    shutil.rmtree(folder)


def read_metrics(path: Path) -> dict[str, float]:
    """Last loss, and the usual tokens per second, of a run."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    steps = [row for row in rows if row["kind"] == "train"]
    return {"loss": steps[-1]["loss"], "tokens_per_s": round(median(row["tokens_per_s"] for row in steps))}


if __name__ == "__main__":
    run_tool(main)
