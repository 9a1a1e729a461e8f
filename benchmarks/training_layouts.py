"""Training steps of one model spread over GPUs in every way there is: speed, memory, and the same losses.

Full-width layers of a published model, as many as fit, on packed rows with the statistics of the data. Every layout
trains from the same weights on the same rows, so their losses must agree; a layout whose losses do not is not recorded.
What the authors of Multiverse train with can stand beside them, see `RIVALS` in transformers_way.py.

    torchrun --standalone --nproc-per-node 2 -m benchmarks.training_layouts
    torchrun --standalone --nproc-per-node 4 --max-restarts 3 -m benchmarks.training_layouts \
      --num-layers 28 --recompute auto --layouts "['TP4+SP', 'TP2xCP2+SP', 'transformers, dense mask, FSDP2']"

A layout that runs out of memory ends all ranks. With --max-restarts torchrun starts them again, this is recorded, and
the other layouts go on.

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
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from benchmarks.attempts import Attempts
from benchmarks.kernels.cases import TAG_IDS
from benchmarks.kernels.record import Recorder
from benchmarks.training_rows import PackedRows
from benchmarks.transformers_way import RIVALS
from megatron_multiverse.cli import parse_options, run_tool
from megatron_multiverse.config import LayerConfig, ModelConfig, TrainConfig
from megatron_multiverse.errors import ConfigError
from megatron_multiverse.model.families import preset
from megatron_multiverse.parallel.ranks import Ranks, joined_ranks
from megatron_multiverse.training.flops import training_flops
from megatron_multiverse.training.memory import GIB, least_recompute
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
    """Names of the layouts, see `layouts`, or of RIVALS; default all layouts for this number of ranks."""
    model: str = "qwen2.5-7b"
    """A published shape; model/families.py lists them."""
    num_layers: int = 4
    """Layers of it: as many as fit beside the optimizer of the layout that needs most (data parallelism)."""
    vocab_size: int | None = None
    """Rows of the vocabulary; default the published number. The logits of rows above 32K tokens take most of a GPU."""
    tokens: int = 32768
    """Tokens of a packed row."""
    case: str = "packed"
    """What the rows look like; benchmarks/kernels/cases.py describes the cases."""
    rows: int = 4
    """Rows of a step, over all ranks."""
    steps: int = 10
    """Steps of each layout; the first three are not timed."""
    seconds: float | None = None
    """Most seconds of a layout's timed steps, at least one of which is done; default as many as `steps` take."""
    dtype: str = "bf16"
    """bf16 or float32."""
    recompute: str | None = None
    """selective (the MLPs), full, or auto: the fewest whole layers that let a layout fit into this GPU's memory by the
    estimate of --dry-run; default none."""
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
    if world % 2 == 0 and world > 2:
        half = world // 2
        parallel |= {
            f"TP{half}xCP2+SP": {_TP: half, "sequence_parallel": True, _CP: 2},
            f"TP{half}xDP2+SP": {_TP: half, "sequence_parallel": True},
            f"TP{half}xPP2+SP": {_TP: half, "sequence_parallel": True, _PP: 2},
        }
    zero: dict[str, dict[str, Any]] = {f"ZeRO-3 DP{world}": {}, f"ZeRO-3 CP{world}": {_CP: world}}
    return {name: {"engine": "megatron", "parallel": sizes} for name, sizes in parallel.items()} | {
        name: {"engine": "deepspeed", "parallel": sizes} for name, sizes in zero.items()
    }


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
    return dataclasses.replace(model, vocab_size=o.vocab_size or model.vocab_size)


def run_config(o: Options, model: ModelConfig, layout: dict[str, Any]) -> TrainConfig:
    """A training run in one layout; nothing is read from its paths."""
    recompute = {"recompute_granularity": o.recompute} if o.recompute not in (None, "auto") else {}
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


def planned(o: Options, model: ModelConfig, layout: dict[str, Any]) -> dict[str, Any]:
    """A layout with the recompute that lets it fit. Before there are process groups, since the estimate makes its own.

    Where nothing fits by the estimate, all layers are recomputed.
    """
    if o.recompute != "auto" or not torch.cuda.is_available():  # recompute needs CUDA
        return layout
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    gpu = torch.cuda.get_device_properties().total_memory / GIB
    layers = least_recompute(run_config(o, model, layout), model, gpu)
    return layout | {"layers": dataclasses.asdict(layers or LayerConfig(recompute_granularity="full"))}


def measure(
    o: Options,
    model: ModelConfig,
    layout: dict[str, Any],
    ranks: Ranks,
    rows: type[PackedRows] = PackedRows,
    build: Callable[[TrainConfig, PackedRows], Any] | None = None,
) -> Measured:
    """Train so many steps in one layout, on rows of this kind, by this repository's engine or by what `build` makes."""
    config = run_config(o, model, layout)
    config.parallel.check_model(model)
    with joined_groups(config):
        from megatron_multiverse.model.mcore import data_parallel_rank

        on_gpu = torch.cuda.is_available()
        # DeepSpeed's hooks keep its engine alive, so what a layout of ZeRO held is there beside the next one.
        left = torch.cuda.memory_allocated() if on_gpu else 0
        size = config.parallel.data_parallel_size
        loader = rows(o.case, o.tokens, TAG_IDS[0], data_parallel_rank(), size)
        engine = build(config, loader) if build else build_engine(config, model, loader, None)
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
                if o.seconds is not None and ranks.any(sum(times[WARM_UP:]) > o.seconds):
                    break
        memory = (torch.cuda.max_memory_allocated() - left) / GIB if on_gpu else 0.0
        return Measured(
            losses=[float(result.loss) for result in results],
            seconds=max(ranks.gather(statistics.median(times[WARM_UP:]))),
            tokens=results[-1].tokens,
            pairs=int(results[-1].visible_pairs),
            peak_tflops=engine.peak_tflops,
            memory_gib=max(ranks.gather(memory)),
        )


def case_of(o: Options, name: str, layout: dict[str, Any], world: int) -> dict[str, Any]:
    """What tells a record from the others."""
    vocabulary = "" if o.vocab_size is None else f", vocabulary of {o.vocab_size}"
    return {
        "layout": name,
        "gpus": world,
        "model": f"{o.model}, {o.num_layers} layers{vocabulary}",
        "rows": f"{o.rows} x {o.tokens} {o.case}",
        "recompute": "full" if name in RIVALS else recompute_of(o, layout.get("layers", {})),
    }


def recompute_of(o: Options, layers: dict[str, Any]) -> str:
    """Which activations a layout computes again, in words."""
    if o.recompute != "auto":
        return o.recompute or "none"
    if layers.get("recompute_method") != "block":
        return layers.get("recompute_granularity") or "none"
    return f"full, first {layers['recompute_num_layers']} layers of a stage"


def numbers(model: ModelConfig, world: int, found: Measured, difference: float) -> dict[str, Any]:
    """What is recorded of a layout that ran."""
    tflops = training_flops(model, found.tokens, found.pairs) / found.seconds / 1e12
    return {
        "s_per_step": found.seconds,
        "tokens_per_s_per_gpu": found.tokens / found.seconds / world,
        "mfu_visible": None if found.peak_tflops is None else tflops / found.peak_tflops,
        "peak_gib": found.memory_gib,
        "steps": len(found.losses),
        "first_loss": found.losses[0],
        "last_loss": found.losses[-1],
        "loss_difference": difference,
    }


def chosen(o: Options, world: int) -> dict[str, dict[str, Any]]:
    """The layouts to measure. Raises ConfigError for names that there are not."""
    rivals = {name: {"engine": "megatron", "parallel": {}} for name in RIVALS}
    known = layouts(world) | rivals
    if unknown := [name for name in o.layouts if name not in known]:
        raise ConfigError(f"layouts {unknown} unknown for {world} ranks, allowed: {', '.join(known)}")
    if o.steps <= WARM_UP:
        raise ConfigError(f"steps must be above {WARM_UP}, which are not timed, got {o.steps}")
    runs_zero = importlib.util.find_spec("deepspeed") is not None
    if not runs_zero and not o.layouts:
        print("without the layouts of ZeRO: the package deepspeed is not installed", file=sys.stderr)
    usable = [name for name, layout in layouts(world).items() if runs_zero or layout["engine"] != "deepspeed"]
    return {name: known[name] for name in o.layouts or [name for name in usable if can_be_cut(o, known[name])]}


def can_be_cut(o: Options, layout: dict[str, Any]) -> bool:
    """Whether the model and the rows divide among the ranks of a layout; where nobody named it, it is left out."""
    try:
        run_config(o, shape_of(o), layout).parallel.check_model(shape_of(o))
    except ConfigError as error:
        print(f"left out: {error}", file=sys.stderr)
        return False
    return True


def main() -> None:
    """Measure every layout, one after the other."""
    o = parse_options(Options)
    world = int(os.environ.get("WORLD_SIZE", "1"))
    model = shape_of(o)
    wanted = {
        name: layout if name in RIVALS else planned(o, model, layout) for name, layout in chosen(o, world).items()
    }
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    logging.getLogger("megatron").setLevel(logging.WARNING)
    with joined_ranks(world) as ranks:
        recorder = None
        if ranks.is_first and torch.cuda.is_available() and not o.tiny:
            command = f"torchrun --standalone --nproc-per-node {world} -m benchmarks.training_layouts"
            key = ("layout", "gpus", "model", "rows", "recompute")
            output = o.output or str(RESULTS)
            recorder = Recorder("training_layouts", output, o.commit, key=key, command=command)
        measure_all(o, model, wanted, ranks, recorder)
        if recorder is not None:
            recorder.table(
                "Training steps (forward, backward, optimizer) of one model from the same weights on the same rows, in "
                f"each layout; median of the steps after the first {WARM_UP}. MFU counts visible pairs alone; memory "
                "is the largest of the ranks; loss_difference is the largest relative one from the losses of the first "
                "layout of the same call."
            )


def measure_all(
    o: Options, model: ModelConfig, wanted: dict[str, dict[str, Any]], ranks: Ranks, recorder: Recorder | None
) -> None:
    """Measure and report the layouts that earlier processes of this run of torchrun did not, and report what failed."""
    attempts, first = Attempts(ranks), list[float]()
    for name, layout in wanted.items():
        case = case_of(o, name, layout, ranks.size)
        if (earlier := attempts.outcome(name)) is not None:
            first = first or (earlier["losses"] if isinstance(earlier, dict) else [])
            if ranks.is_first and isinstance(earlier, str):
                report(o, recorder, case | {"result": earlier})
            continue
        with attempts.part(name) as noted:
            make = RIVALS.get(name)
            build = None if make is None else lambda config, rows, make=make: make(config, model)
            found = measure(o, model, layout, ranks, build=build)
            noted["losses"] = found.losses
        first = first or found.losses
        difference = max(abs(a - b) / b for a, b in zip(found.losses, first, strict=False))
        if ranks.is_first:
            how = {} if make else {"loss_chunk_tokens": run_config(o, model, layout).loss_chunk_tokens}
            report(o, recorder, case | how | numbers(model, ranks.size, found, difference))
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    attempts.forget()


def report(o: Options, recorder: Recorder | None, values: dict[str, Any]) -> None:
    """Record a layout, or print it where nothing is recorded."""
    if values.get("loss_difference", 0.0) > TOLERANCE[o.dtype]:
        print(f"NOT RECORDED, its losses are others: {values}", flush=True)
    elif recorder is None:
        print(values, flush=True)
    else:
        recorder.add(**values)


if __name__ == "__main__":
    run_tool(main)
