"""Training steps of one model spread over GPUs in every way there is: speed, memory, and the same losses.

Full-width layers of a published model, as many as fit, on packed rows with the statistics of the data. Every layout
trains from the same weights on the same rows, so their losses must agree; a layout whose losses do not is not recorded.

    torchrun --standalone --nproc-per-node 2 -m benchmarks.training_layouts

Without GPUs `--tiny` runs the same over gloo with a model of a few thousand parameters and records nothing.
"""

from __future__ import annotations

import dataclasses
import gc
import importlib.util
import logging
import os
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.kernels.cases import TAG_IDS, WORD, make_ids
from benchmarks.kernels.record import Recorder
from megatron_multiverse.cli import parse_options, run_tool
from megatron_multiverse.config import ModelConfig, TrainConfig
from megatron_multiverse.errors import ConfigError
from megatron_multiverse.kernels.structure_scan import structure_scan_reference
from megatron_multiverse.model.families import preset
from megatron_multiverse.parallel.ranks import Ranks, joined_ranks
from megatron_multiverse.training.flops import training_flops
from megatron_multiverse.training.microbatches import Microbatch
from megatron_multiverse.training.start import joined_groups
from megatron_multiverse.training.trainer import build_engine

RESULTS = Path(__file__).parent / "results"
WARM_UP = 3
"""Steps that are not timed: kernels are compiled and buffers made."""
TOLERANCE = {"bf16": 1e-2, "float32": 1e-4}
"""Largest relative difference of a loss from the first layout's."""
_TP, _PP, _CP = (f"{name}_parallel_size" for name in ("tensor_model", "pipeline_model", "context"))


@dataclass
class Options:
    """What to measure."""

    layouts: list[str] = field(default_factory=list)
    """Names of the layouts, see `layouts`; default all for this number of ranks."""
    model: str = "qwen2.5-7b"
    """A published shape; model/families.py lists them."""
    num_layers: int = 4
    """Layers of it: as many as fit beside the optimizer of the layout that needs most (data parallelism)."""
    tokens: int = 32768
    """Tokens of a packed row."""
    case: str = "packed"
    """What the rows look like; benchmarks/kernels/cases.py describes the cases."""
    rows: int = 4
    """Rows of a step, over all ranks."""
    steps: int = 10
    """Steps of each layout; the first three are not timed."""
    dtype: str = "bf16"
    """bf16 or float32."""
    recompute: str | None = None
    """selective (the MLPs) or full; default none."""
    tiny: bool = False
    """A model and rows for a test without a GPU."""
    output: str | None = None
    """Folder of the results; default benchmarks/results."""
    commit: str | None = None
    """Commit to record; default that of the working tree."""


def layouts(world: int) -> dict[str, dict[str, Any]]:
    """Name -> settings of the run, for so many ranks."""
    parallel: dict[str, dict[str, Any]] = {
        f"TP{world}": {_TP: world},
        f"TP{world}+SP": {_TP: world, "sequence_parallel": True},
        f"CP{world} all_gather": {_CP: world},
        f"CP{world} a2a": {_CP: world, "cp_comm_type": "a2a"},
        f"PP{world}": {_PP: world},
        f"PP{world} interleaved": {_PP: world, "virtual_pipeline_model_parallel_size": 2},
        f"DP{world}": {},
    }
    zero: dict[str, dict[str, Any]] = {f"ZeRO-3 DP{world}": {}, f"ZeRO-3 CP{world}": {_CP: world}}
    return {name: {"engine": "megatron", "parallel": sizes} for name, sizes in parallel.items()} | {
        name: {"engine": "deepspeed", "parallel": sizes} for name, sizes in zero.items()
    }


class PackedRows:
    """A `Loader` of rows of one structure with random words: microbatch number n depends on n alone.

    Args:
        case: name of the structure.
        tokens: length of a row.
        words: ids of words lie below.
        rank: data parallel rank.
        size: data parallel size.
    """

    tag_ids: tuple[int, ...] = TAG_IDS

    def __init__(self, case: str, tokens: int, words: int, rank: int, size: int) -> None:
        self._ids, documents = make_ids(case, tokens + 1)  # one more, for the last label
        self._documents = documents.clamp(max=tokens)
        scan = structure_scan_reference(self._ids[:, :-1], self._documents, torch.tensor(TAG_IDS))
        self._position_ids, self._r = scan.position_ids, scan.r
        self._words, self._rank, self._size, self._number = words, rank, size, 0

    def __iter__(self) -> Iterator[Microbatch]:
        while True:
            generator = torch.Generator().manual_seed(self._number * self._size + self._rank)
            self._number += 1
            ids = torch.where(self._ids == WORD, self.draw_words(generator), self._ids)
            yield {
                "input_ids": ids[:, :-1],
                "labels": ids[:, 1:],
                "loss_mask": (self._ids[:, 1:] == WORD).float(),
                "position_ids": self._position_ids,
                "r": self._r,
                "documents": self._documents,
                "sample_ids": torch.zeros(self._documents.shape[:2], dtype=torch.int64),
                "malformed": torch.zeros(self._documents.shape[:2], dtype=torch.bool),
            }

    def draw_words(self, generator: torch.Generator) -> Tensor:
        """A word for every token of a row, int64 [1, tokens + 1]."""
        return torch.randint(0, self._words, self._ids.shape, generator=generator)

    def sample_name(self, sample_id: int) -> str:
        """All rows have the same structure."""
        return "the row of the benchmark"

    def sample_problem(self, sample_id: int) -> str | None:
        """It has none."""
        return None

    def state_dict(self) -> dict[str, Any]:
        """How many microbatches were handed out."""
        return {"number": self._number}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue there."""
        self._number = state["number"]


@dataclass
class Measured:
    """What one layout did."""

    losses: list[float]
    seconds: float
    """Median time of a step."""
    tokens: int
    pairs: int
    peak_tflops: float | None
    memory_gib: float
    """Largest over the ranks."""


def shape_of(o: Options) -> ModelConfig:
    """The model to train."""
    model = dataclasses.replace(preset(o.model), num_layers=o.num_layers)
    if o.tokens > model.max_sequence_length:  # rotary embeddings have no end
        model = dataclasses.replace(model, max_sequence_length=o.tokens)
    if o.tiny:
        model = dataclasses.replace(
            model, hidden_size=64, ffn_hidden_size=96, num_attention_heads=4, num_query_groups=2, kv_channels=16,
            vocab_size=2048,
        )  # fmt: skip
    return model


def run_config(o: Options, model: ModelConfig, layout: dict[str, Any]) -> TrainConfig:
    """A training run in one layout; nothing is read from its paths."""
    recompute = {"recompute_granularity": o.recompute} if o.recompute else {}
    return TrainConfig.from_dict(
        {
            "model": dataclasses.asdict(model),
            "data": {
                "data_prefixes": ["none"], "seq_length": o.tokens, "micro_batch_size": 1, "global_batch_size": o.rows,
            },
            "checkpoint": {"save": "none"},
            "optim": {"lr": 1e-4, "lr_decay_style": "constant"},
            "layers": recompute,
            **layout,
            "dtype": o.dtype,
            "train_iters": o.steps,
        }
    )  # fmt: skip


def measure(
    o: Options, model: ModelConfig, layout: dict[str, Any], ranks: Ranks, rows: type[PackedRows] = PackedRows
) -> Measured:
    """Train so many steps in one layout, on rows of this kind."""
    config = run_config(o, model, layout)
    config.parallel.check_model(model)
    with joined_groups(config):
        from megatron_multiverse.model.mcore import data_parallel_rank

        size = config.parallel.data_parallel_size
        loader = rows(o.case, o.tokens, TAG_IDS[0], data_parallel_rank(), size)
        engine = build_engine(config, model, loader, None)
        on_gpu = engine.device.type == "cuda"
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        batches, results, times = iter(loader), [], []
        with engine.running():
            for _ in range(o.steps):
                microbatches = list(islice(batches, config.num_microbatches))
                started = time.perf_counter()
                results.append(engine.step(microbatches))
                if on_gpu:
                    torch.cuda.synchronize()
                times.append(time.perf_counter() - started)
        memory = torch.cuda.max_memory_allocated() / 2**30 if on_gpu else 0.0
        return Measured(
            losses=[float(result.loss) for result in results],
            seconds=max(ranks.gather(statistics.median(times[WARM_UP:]))),
            tokens=results[-1].tokens,
            pairs=int(results[-1].visible_pairs),
            peak_tflops=engine.peak_tflops,
            memory_gib=max(ranks.gather(memory)),
        )


def row(o: Options, name: str, model: ModelConfig, world: int, found: Measured, difference: float) -> dict[str, Any]:
    """What is recorded of a layout."""
    tflops = training_flops(model, found.tokens, found.pairs) / found.seconds / 1e12
    return {
        "layout": name,
        "gpus": world,
        "model": f"{o.model}, {model.num_layers} layers",
        "rows": f"{o.rows} x {o.tokens} {o.case}",
        "recompute": o.recompute or "none",
        "s_per_step": found.seconds,
        "tokens_per_s_per_gpu": found.tokens / found.seconds / world,
        "mfu_visible": None if found.peak_tflops is None else tflops / found.peak_tflops,
        "peak_gib": found.memory_gib,
        "first_loss": found.losses[0],
        "last_loss": found.losses[-1],
        "loss_difference": difference,
    }


def chosen(o: Options, world: int) -> dict[str, dict[str, Any]]:
    """The layouts to measure. Raises ConfigError for names that there are not."""
    known = layouts(world)
    if unknown := [name for name in o.layouts if name not in known]:
        raise ConfigError(f"layouts {unknown} unknown for {world} ranks, allowed: {', '.join(known)}")
    if o.steps <= WARM_UP:
        raise ConfigError(f"steps must be above {WARM_UP}, which are not timed, got {o.steps}")
    runs_zero = importlib.util.find_spec("deepspeed") is not None
    if not runs_zero and not o.layouts:
        print("without the layouts of ZeRO: the package deepspeed is not installed", file=sys.stderr)
    usable = [name for name, layout in known.items() if runs_zero or layout["engine"] != "deepspeed"]
    return {name: known[name] for name in o.layouts or usable}


def main() -> None:
    """Measure every layout, one after the other."""
    o = parse_options(Options)
    world = int(os.environ.get("WORLD_SIZE", "1"))
    wanted, model = chosen(o, world), shape_of(o)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    logging.getLogger("megatron").setLevel(logging.WARNING)
    with joined_ranks(world) as ranks:
        recorder = None
        if ranks.is_first and torch.cuda.is_available() and not o.tiny:
            command = f"torchrun --standalone --nproc-per-node {world} -m benchmarks.training_layouts"
            key = ("layout", "gpus", "model", "rows", "recompute")
            output = o.output or str(RESULTS)
            recorder = Recorder("training_layouts", output, o.commit, key=key, command=command)
        first: list[float] = []
        for name, layout in wanted.items():
            found = measure(o, model, layout, ranks)
            first = first or found.losses
            difference = max(abs(a - b) / b for a, b in zip(found.losses, first, strict=True))
            if ranks.is_first:
                report(o, recorder, row(o, name, model, world, found, difference))
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        if recorder is not None:
            recorder.table(
                "Training steps (forward, backward, optimizer) of one model from the same weights on the same rows, in "
                f"each layout; median of {o.steps - WARM_UP} steps. MFU counts visible pairs alone; memory is the "
                "largest of the ranks; loss_difference is the largest relative one from the first layout's losses."
            )


def report(o: Options, recorder: Recorder | None, values: dict[str, Any]) -> None:
    """Record a layout, or print it where nothing is recorded."""
    if values["loss_difference"] > TOLERANCE[o.dtype]:
        print(f"NOT RECORDED, its losses are others: {values}", flush=True)
    elif recorder is None:
        print(values, flush=True)
    else:
        recorder.add(**values)


if __name__ == "__main__":
    run_tool(main)
