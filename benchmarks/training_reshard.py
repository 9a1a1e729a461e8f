"""A checkpoint saved in one layout and loaded in another: the same weights bit for bit, and the same next loss.

Full-width layers of a published model train a few steps in one layout and are saved; another layout, whose own fresh
weights are others, loads the checkpoint. The whole models before and after are compared tensor by tensor, and so is the
loss of the next step on the same rows, which the optimizer's moments take part in from the second one on.

    torchrun --standalone --nproc-per-node 4 -m benchmarks.training_reshard --folder /dev/shm/reshard

Without GPUs `--tiny` runs the same over gloo with a model of a few thousand parameters and records nothing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import logging
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from benchmarks.kernels.cases import TAG_IDS
from benchmarks.kernels.record import Recorder
from benchmarks.training_layouts import RESULTS, layouts, planned, run_config, shape_of
from benchmarks.training_layouts import Options as LayoutOptions
from benchmarks.training_resume import differing_weights
from benchmarks.training_rows import PackedRows
from megatron_multiverse.cli import parse_options, run_tool
from megatron_multiverse.config import ModelConfig, TrainConfig
from megatron_multiverse.errors import ConfigError
from megatron_multiverse.parallel.ranks import Ranks, joined_ranks
from megatron_multiverse.training.checkpoint import TrainState
from megatron_multiverse.training.description import RunDescription
from megatron_multiverse.training.engine import TrainEngine
from megatron_multiverse.training.run_folder import RunFolder
from megatron_multiverse.training.seeds import seed_everything
from megatron_multiverse.training.start import joined_groups
from megatron_multiverse.training.trainer import build_engine

STEPS = 2
"""Steps before the save, and steps that both go on for after it."""


@dataclass
class Options:
    """What to save and load."""

    saved_by: str = ""
    """Layout that saves, a name of benchmarks.training_layouts; default tensor parallelism over all ranks."""
    loaded_by: str = ""
    """Layout that loads; default tensor parallelism over half of the ranks, two data parallel groups."""
    model: str = "qwen2.5-7b"
    """A published shape; model/families.py lists them."""
    num_layers: int = 14
    """Layers of it: a checkpoint has 12 bytes for each parameter."""
    tokens: int = 8192
    """Tokens of a packed row."""
    rows: int = 4
    """Rows of a step, over all ranks."""
    tiny: bool = False
    """A model and rows for a test without GPUs."""
    folder: str | None = None
    """Where checkpoint and models go; removed at the end. Default a temporary folder."""
    output: str | None = None
    """Folder of the results; default benchmarks/results."""
    commit: str | None = None
    """Commit to record; default that of the working tree."""

    def __post_init__(self) -> None:
        world = int(os.environ.get("WORLD_SIZE", "1"))
        self.saved_by = self.saved_by or f"TP{world}+SP"
        self.loaded_by = self.loaded_by or f"TP{world // 2}xDP2+SP"
        known = layouts(world)
        if unknown := [name for name in (self.saved_by, self.loaded_by) if name not in known]:
            raise ConfigError(f"layouts {unknown} unknown for {world} ranks, allowed: {', '.join(known)}")

    def run(self, layout: str, save: Path, *, seed: int) -> TrainConfig:
        """A run in one layout, with the recompute that lets it fit."""
        options = LayoutOptions(
            model=self.model, num_layers=self.num_layers, tokens=self.tokens, rows=self.rows, steps=2 * STEPS,
            dtype="float32" if self.tiny else "bf16", recompute="auto", tiny=self.tiny,
        )  # fmt: skip
        model, world = shape_of(options), int(os.environ.get("WORLD_SIZE", "1"))
        config = run_config(options, model, planned(options, model, layouts(world)[layout]))
        checkpoint = dataclasses.replace(config.checkpoint, save=str(save), save_interval=0)
        return dataclasses.replace(config, checkpoint=checkpoint, seed=seed)


@contextlib.contextmanager
def engine_of(config: TrainConfig, model: ModelConfig) -> Iterator[tuple[TrainEngine, PackedRows]]:
    """An engine in its process groups, and its rows."""
    with joined_groups(config):
        seed_everything(config.seed)
        from megatron_multiverse.model.mcore import data_parallel_rank

        size = config.parallel.data_parallel_size
        rows = PackedRows("packed", config.data.seq_length, TAG_IDS[0], data_parallel_rank(), size)
        engine = build_engine(config, model, rows, None)
        with engine.running():
            yield engine, rows
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def train_steps(engine: TrainEngine, rows: PackedRows, config: TrainConfig) -> list[float]:
    """The losses of the next steps."""
    batches = iter(rows)
    results = [engine.step(list(islice(batches, config.num_microbatches))) for _ in range(STEPS)]
    return [float(result.loss) for result in results]


def save(config: TrainConfig, model: ModelConfig, ranks: Ranks, weights: Path) -> tuple[list[float], float]:
    """Train, save a checkpoint and the weights alone, and train on; the later losses, and the seconds of the save."""
    with engine_of(config, model) as (engine, rows), RunFolder(config.checkpoint, ranks) as run:
        train_steps(engine, rows, config)
        described = RunDescription(model, dataclasses.replace(config, layers=engine.layers))
        started = time.perf_counter()
        run.save(TrainState(engine, rows, STEPS, STEPS * config.data.global_batch_size), described)
        seconds = time.perf_counter() - started
        engine.save_model(weights)
        return train_steps(engine, rows, config), seconds


def load(config: TrainConfig, model: ModelConfig, ranks: Ranks, weights: Path) -> tuple[list[float], float]:
    """Load the checkpoint, save the weights alone, and train on; the losses, and the seconds of the load."""
    with engine_of(config, model) as (engine, rows), RunFolder(config.checkpoint, ranks) as run:
        state = TrainState(engine, rows)
        described = RunDescription(model, dataclasses.replace(config, layers=engine.layers))
        started = time.perf_counter()
        assert run.resume(state, described) and state.step == STEPS
        seconds = time.perf_counter() - started
        engine.save_model(weights)
        return train_steps(engine, rows, config), seconds


def compare(o: Options, folder: Path, ranks: Ranks, configs: tuple[TrainConfig, TrainConfig]) -> dict[str, Any]:
    """Save, load, and what differs."""
    model = configs[0].model
    assert model is not None
    before, after = folder / "before", folder / "after"
    losses, save_seconds = save(configs[0], model, ranks, before)
    loaded, load_seconds = load(configs[1], model, ranks, after)
    size = sum(file.stat().st_size for file in (folder / "run").rglob("*") if file.is_file())
    return {
        "saved_by": o.saved_by,
        "loaded_by": o.loaded_by,
        "gpus": ranks.size,
        "model": f"{o.model}, {model.num_layers} layers",
        "rows": f"{o.rows} x {o.tokens} packed",
        "checkpoint_gib": size / 2**30,
        "save_s": save_seconds,
        "load_s": load_seconds,
        "weights_differing": ranks.first(lambda: differing_weights(before, after)),
        "next_losses": losses,
        "next_losses_loaded": loaded,
        "loss_difference": max(abs(a - b) / b for a, b in zip(loaded, losses, strict=True)),
    }


def main() -> None:
    """Save in one layout, load in the other."""
    o = parse_options(Options)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    logging.getLogger("megatron").setLevel(logging.WARNING)
    folder = Path(o.folder or Path(tempfile.gettempdir()) / f"reshard-{os.environ.get('TORCHELASTIC_RUN_ID', '0')}")
    names = o.saved_by, o.loaded_by
    # The layout that loads begins with other weights, so that equal ones can only come from the checkpoint.
    saving, loading = (o.run(name, folder / "run", seed=number) for number, name in enumerate(names, 1))
    with joined_ranks(saving.parallel.world_size) as ranks:
        recorder = None
        if ranks.is_first and torch.cuda.is_available() and not o.tiny:
            command = f"torchrun --standalone --nproc-per-node {ranks.size} -m benchmarks.training_reshard"
            key = ("saved_by", "loaded_by", "gpus", "model", "rows")
            recorder = Recorder("training_reshard", o.output or str(RESULTS), o.commit, key=key, command=command)
        try:
            found = compare(o, folder, ranks, (saving, loading))
        finally:
            if ranks.is_first:
                shutil.rmtree(folder, ignore_errors=True)
        if recorder is not None:
            recorder.add(**found)
            recorder.table(
                "A checkpoint saved in one layout and loaded in another: tensors of the whole model that are not the "
                "same bits afterwards, and the largest relative difference of the next losses on the same rows."
            )
        elif ranks.is_first:
            print(found, flush=True)


if __name__ == "__main__":
    run_tool(main)
