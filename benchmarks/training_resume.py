"""A deterministic run on several GPUs that is stopped and goes on in new processes, beside one that was not stopped.

Full-width layers of a published model train a few steps in each layout twice: straight through, and with a checkpoint
half way from which other processes go on. Losses, gradient norms and final weights are compared bit by bit.

    python -m benchmarks.training_resume

It starts torchrun twice by itself. Without GPUs `--tiny` runs the same over gloo with a model of a few thousand
parameters and records nothing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import json
import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from benchmarks.kernels.cases import TAG_IDS
from benchmarks.kernels.record import Recorder
from benchmarks.training_layouts import RESULTS, layouts, run_config, shape_of
from benchmarks.training_layouts import Options as LayoutOptions
from benchmarks.training_rows import PackedRows
from megatron_multiverse.checkpoints.run_files import METRICS_FILE, MODEL_FOLDER
from megatron_multiverse.cli import parse_options, run_tool
from megatron_multiverse.config import TrainConfig
from megatron_multiverse.errors import ConfigError
from megatron_multiverse.model.weights import WEIGHTS_FILE

PARTS = ("before", "after")
"""What runs before the stop, with the straight run, and what runs after it, in processes of its own."""


@dataclass
class Options:
    """What to run."""

    layouts: list[str] = field(default_factory=list)
    """Names of layouts of benchmarks.training_layouts; default tensor and data parallelism."""
    ranks: int = 2
    """GPUs, or gloo ranks with --tiny."""
    model: str = "qwen2.5-7b"
    """A published shape; model/families.py lists them."""
    num_layers: int = 2
    """Layers of it, at their full width."""
    vocab_size: int = 16384
    """Rows of the vocabulary: fewer than published ones, since checkpoints are written and read here."""
    tokens: int = 8192
    """Tokens of a packed row."""
    steps: int = 6
    """Steps of the straight run; the other one is stopped half way."""
    tiny: bool = False
    """A model and rows for a test without GPUs."""
    folder: str | None = None
    """Where the runs go; default a temporary folder, which is removed."""
    part: str | None = None
    """Under torchrun alone: which part this process is, before or after."""
    output: str | None = None
    """Folder of the results; default benchmarks/results."""
    commit: str | None = None
    """Commit to record; default that of the working tree."""

    def __post_init__(self) -> None:
        known = layouts(self.ranks)
        self.layouts = self.layouts or [f"TP{self.ranks}", f"DP{self.ranks}"]
        if unknown := [name for name in self.layouts if name not in known]:
            raise ConfigError(f"layouts {unknown} unknown for {self.ranks} ranks, allowed: {', '.join(known)}")
        if self.part not in (None, *PARTS):
            raise ConfigError(f"part is {self.part!r}, allowed: {', '.join(PARTS)}")
        if self.steps < 2:
            raise ConfigError(f"steps must be at least 2, got {self.steps}: a run of one cannot be stopped half way")

    def run(self, layout: str, save: Path, steps: int) -> TrainConfig:
        """A deterministic run of so many steps."""
        options = LayoutOptions(
            model=self.model, num_layers=self.num_layers, tokens=self.tokens, rows=2, steps=self.steps, tiny=self.tiny
        )
        model = dataclasses.replace(shape_of(options), vocab_size=2048 if self.tiny else self.vocab_size)
        config = run_config(options, model, {**layouts(self.ranks)[layout], "deterministic": True})
        return dataclasses.replace(
            config,
            train_iters=steps,
            checkpoint=dataclasses.replace(config.checkpoint, save=str(save), save_interval=0),
            log=dataclasses.replace(config.log, log_interval=1),
        )


def play(o: Options, folder: Path) -> None:
    """One part of both runs, in every layout, on this rank."""
    from megatron_multiverse.parallel.ranks import joined_ranks

    with joined_ranks(o.ranks):
        for layout in o.layouts:
            runs = {"straight": o.steps, "stopped": o.steps // 2} if o.part == "before" else {"stopped": o.steps}
            for name, steps in runs.items():
                train_on(o.run(layout, folder / f"{layout}, {name}", steps))
                gc.collect()
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()


def train_on(config: TrainConfig) -> None:
    """Train this rank's part, from the checkpoint if there is one."""
    from megatron_multiverse.model.mcore import data_parallel_rank
    from megatron_multiverse.training.start import joined_groups
    from megatron_multiverse.training.trainer import train

    assert config.model is not None
    with joined_groups(config):
        ranks = config.parallel.data_parallel_size
        rows = PackedRows("packed", config.data.seq_length, TAG_IDS[0], data_parallel_rank(), ranks)
        train(config, rows)


def compare(straight: Path, stopped: Path) -> dict[str, Any]:
    """What differs between two finished runs of the same steps."""
    numbers = [steps_of(folder) for folder in (straight, stopped)]
    return {
        "steps": len(numbers[0]),
        "losses_equal": [row["loss"] for row in numbers[0]] == [row["loss"] for row in numbers[1]],
        "grad_norms_equal": [row["grad_norm"] for row in numbers[0]] == [row["grad_norm"] for row in numbers[1]],
        "weights_differing": differing_weights(*(folder / MODEL_FOLDER for folder in (straight, stopped))),
        "last_loss": numbers[0][-1]["loss"],
        "last_loss_resumed": numbers[1][-1]["loss"],
    }


def steps_of(folder: Path) -> list[dict[str, Any]]:
    """The training records of a run, a step each."""
    rows = map(json.loads, (folder / METRICS_FILE).read_text(encoding="utf-8").splitlines())
    return [row for row in rows if row["kind"] == "train"]


def differing_weights(one: Path, other: Path) -> int:
    """How many tensors of two model folders are not the same bits."""
    with contextlib.ExitStack() as stack:
        a, b = (stack.enter_context(safe_open(folder / WEIGHTS_FILE, "pt")) for folder in (one, other))
        names = list(a.keys())
        assert names == list(b.keys()), "runs of one model"
        return sum(not torch.equal(as_bits(a.get_tensor(name)), as_bits(b.get_tensor(name))) for name in names)


def as_bits(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor: unlike numbers they are equal where both are NaN, and 0 is not -0."""
    return tensor.contiguous().view(torch.uint8)


def start(o: Options, folder: Path) -> None:
    """Run both parts by torchrun, each in processes of its own.

    Raises:
        subprocess.CalledProcessError: one of them failed, and said why.
    """
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(o.ranks)]
    for part in PARTS:
        command = [*torchrun, "-m", "benchmarks.training_resume", *sys.argv[1:], "--part", part]
        subprocess.run([*command, "--folder", str(folder)], check=True)


@contextlib.contextmanager
def run_folder(o: Options) -> Iterator[Path]:
    """Where the runs go."""
    if o.folder is not None:
        yield Path(o.folder)
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def main() -> None:
    """Run and compare; or, under torchrun, be one rank of a part."""
    o = parse_options(Options)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    logging.getLogger("megatron").setLevel(logging.WARNING)
    if o.part is not None:
        assert o.folder is not None and "WORLD_SIZE" in os.environ, "a part is started by this program alone"
        play(o, Path(o.folder))
        return
    recorder = None
    if torch.cuda.is_available() and not o.tiny:
        key = ("layout", "gpus", "model", "vocab_size", "tokens")
        command = "python -m benchmarks.training_resume"
        recorder = Recorder("training_resume", o.output or str(RESULTS), o.commit, key=key, command=command)
    with run_folder(o) as folder:
        start(o, folder)
        for layout in o.layouts:
            found = compare(folder / f"{layout}, straight", folder / f"{layout}, stopped")
            model = f"{o.model}, {o.num_layers} layers"
            row = {"layout": layout, "gpus": o.ranks, "model": model, "vocab_size": o.vocab_size, "tokens": o.tokens}
            if recorder is None:
                print(row | found, flush=True)
            else:
                recorder.add(**row, **found)
    if recorder is not None:
        recorder.table(
            "Deterministic runs in each layout, straight through and stopped half way, with new processes that go on "
            "from the checkpoint: are all losses and gradient norms the same bits, and how many weight tensors differ."
        )


if __name__ == "__main__":
    run_tool(main)
