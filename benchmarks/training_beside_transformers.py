"""Training steps of one model on one GPU: ours, and what the authors of Multiverse run.

Theirs is transformers' Qwen2 with a dense 4-D mask through torch's scaled_dot_product_attention, gradient checkpointing
and bf16 autocast. Both train the same weights on the same packed rows, with the same optimizer, one after the other in
one call; a loss that differs is not recorded. Beside them stands our code with TransformerEngine's plain causal
attention, which is another model, but what the mask costs. Running out of memory is a result, too. Beside our step
stands what it waits for before its forward pass: the scan of its structure, and the loader (training_input.py).

    python -m benchmarks.training_beside_transformers
    python -m benchmarks.training_beside_transformers --case wide --tokens 16384

Each row is written as soon as it is known. The log on stderr says how long each model took to build and each step, the
first of which compiles: name several lengths and runners in one call, which compiles once.

Without a GPU `--tiny` runs the same on a CPU with a model of a few thousand parameters and records nothing.
"""

from __future__ import annotations

import dataclasses
import gc
import logging
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.kernels.cases import TAG_IDS
from benchmarks.kernels.record import Recorder
from benchmarks.training_input import input_costs
from benchmarks.training_layouts import RESULTS, WARM_UP, run_config, shape_of
from benchmarks.training_layouts import Options as LayoutOptions
from benchmarks.training_rows import PackedRows
from benchmarks.transformers_way import masked_loss, transformers_model
from megatron_multiverse.checkpoints.fresh import FreshSource
from megatron_multiverse.checkpoints.load import model_from_source
from megatron_multiverse.cli import parse_options, run_tool
from megatron_multiverse.config import ModelConfig, TrainConfig
from megatron_multiverse.errors import ConfigError
from megatron_multiverse.model.attention import LayoutParams
from megatron_multiverse.model.device import choose_device
from megatron_multiverse.training.flops import training_flops
from megatron_multiverse.training.forward import precision
from megatron_multiverse.training.microbatches import Microbatch
from megatron_multiverse.training.one_process import OneProcessEngine
from megatron_multiverse.training.optim import build_optimizer, clip_gradients
from megatron_multiverse.training.placement import TokenPlacer
from megatron_multiverse.training.start import chosen_layers, dtypes

logger = logging.getLogger(__name__)

Train = Callable[[Sequence[Microbatch]], Tensor]
"""One optimizer step on these microbatches; the mean loss over their trained tokens before it."""
OURS = "ours"
TOLERANCE = {"bf16": 1e-2, "float32": 1e-4}
"""Largest relative difference of a loss from that of the first runner."""
SEED = 0


@dataclass
class Options:
    """What to measure."""

    tokens: list[int] = field(default_factory=lambda: [8192, 16384, 32768])
    """Tokens of a packed row, a step each."""
    model: str = "qwen2.5-7b"
    """A published shape; model/families.py lists them."""
    num_layers: int = 4
    """Layers of it: as many as fit beside their float32 weights, gradients and moments."""
    case: str = "packed"
    """What the rows look like; benchmarks/kernels/cases.py describes the cases."""
    runners: list[str] = field(default_factory=list)
    """Any of those in RUNNERS; default all that can run here."""
    steps: int = 10
    """Steps of each; the first three are not timed."""
    dtype: str = "bf16"
    """bf16 (float32 weights, matrix products by autocast) or float32."""
    input_costs: bool = True
    """Also measure what our step waits for before its forward pass; this takes half a minute a length."""
    tiny: bool = False
    """A model and rows for a test without a GPU."""
    output: str | None = None
    """Folder of the results; default benchmarks/results."""
    commit: str | None = None
    """Commit to record; default that of the working tree."""

    def run(self, tokens: int) -> TrainConfig:
        """The run in one process that all runners take their settings from."""
        options = LayoutOptions(
            model=self.model, num_layers=self.num_layers, tokens=tokens, rows=1, steps=self.steps, dtype=self.dtype,
            tiny=self.tiny,
        )  # fmt: skip
        return run_config(options, shape_of(options), {"engine": "one_process"})


class CausalAttention(nn.Module):
    """TransformerEngine's plain causal attention over as many tokens as our layers hand over."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        from transformer_engine.pytorch import DotProductAttention

        heads, groups = model.num_attention_heads, model.num_query_groups
        self.inner = DotProductAttention(heads, model.kv_channels, num_gqa_groups=groups, attn_mask_type="causal")

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out: Tensor = self.inner(query, key, value)
        return out


class CausalParams(LayoutParams):
    """Attends to all earlier tokens, whatever their labels say."""

    attention: CausalAttention

    def attend(self, query: Tensor, key: Tensor, value: Tensor, *, layer_number: int, softmax_scale: float) -> Tensor:
        """See AttentionParams.attend."""
        out: Tensor = self.attention(query, key, value)
        return out


class CausalPlacer(TokenPlacer):
    """Lays microbatches out as ours does, and hands the layers plain causal attention."""

    attention: CausalAttention

    def place(self, batch: Microbatch, input_ids: Tensor) -> tuple[Tensor, LayoutParams]:
        """See TokenPlacer.place."""
        position_ids, params = super().place(batch, input_ids)
        causal = CausalParams(layout=params.layout, backend=params.backend)
        causal.attention = self.attention
        return position_ids, causal


def ours(o: Options, tokens: int, rows: PackedRows, *, causal: bool = False, **layer_settings: Any) -> Train:
    """Our engine for one process, with these settings of `layers`; its weights are those of every runner."""
    config, device = o.run(tokens), choose_device("auto")
    config = dataclasses.replace(config, layers=dataclasses.replace(config.layers, **layer_settings))
    assert config.model is not None
    dtype, compute_dtype = dtypes(config)
    layers = chosen_layers(config, config.model, device, compute_dtype)
    source = FreshSource(config.model, SEED, device)
    options: dict[str, Any] = {"layers": layers, "compute_dtype": compute_dtype, "on_device": True}
    model, _ = model_from_source(source, dtype=dtype, device=device, **options)
    engine = OneProcessEngine(config, model, config.model, layers, rows)
    if causal:
        placer = CausalPlacer(rows, device, layers.attention_backend)
        placer.attention = CausalAttention(config.model)
        engine._placers.train = placer
    return lambda microbatches: engine.step(microbatches).loss


def partly_recomputed(o: Options, tokens: int, rows: PackedRows) -> Train:
    """Ours with the activations of three in five layers computed again, where `theirs` computes all of them again: with
    ten layers that stays below its memory at every length, which ours without any does with 32,768 tokens alone."""
    number = math.ceil(0.6 * o.num_layers)
    return ours(o, tokens, rows, recompute_granularity="full", recompute_method="block", recompute_num_layers=number)


def theirs(o: Options, tokens: int, rows: PackedRows) -> Train:
    """transformers' model with a dense mask and gradient checkpointing, and our optimizer's settings."""
    config, device = o.run(tokens), choose_device("auto")
    assert config.model is not None
    model = transformers_model(config.model, SEED, device)
    optimizer = build_optimizer(model, config.optim)

    def step(microbatches: Sequence[Microbatch]) -> Tensor:
        count, total = sum(int(batch["loss_mask"].sum()) for batch in microbatches), torch.zeros((), device=device)
        for batch in microbatches:
            with precision(o.dtype, device):
                loss = masked_loss(model, batch, device, o.dtype, count)
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
        clip_gradients(model.parameters(), config.optim.clip_grad)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return total

    return step


RUNNERS: dict[str, Callable[[Options, int, PackedRows], Train]] = {
    OURS: ours,
    "ours, loss of all tokens at once": lambda *args: ours(*args, loss_chunk_tokens=0),
    "ours, loss in chunks of 2048": lambda *args: ours(*args, loss_chunk_tokens=2048),
    "ours, loss in chunks of 8192": lambda *args: ours(*args, loss_chunk_tokens=8192),
    "ours, full recompute": lambda *args: ours(*args, recompute_granularity="full"),
    "ours, three in five layers recomputed": partly_recomputed,
    "transformers, dense mask, checkpointing": theirs,
    "ours with TE causal attention": lambda *args: ours(*args, causal=True),
}
OTHER_MODEL = "ours with TE causal attention"
"""Its losses are not those of the others."""
NEED_A_GPU = ("ours, full recompute", "ours, three in five layers recomputed", OTHER_MODEL)


@dataclass
class Measured:
    """What one runner did."""

    losses: list[float]
    seconds: float
    memory_gib: float
    input_costs: dict[str, Any]
    """See `training_input.input_costs`; measured for our own steps alone."""


def measure(o: Options, name: str, tokens: int, batches: Iterator[Microbatch], rows: PackedRows) -> Measured | None:
    """Train so many steps; None if the GPU's memory does not suffice."""
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    losses, times, started = [], [], time.perf_counter()
    try:
        step = RUNNERS[name](o, tokens, rows)
        if on_gpu:
            torch.cuda.synchronize()
        logger.info("%s, %d tokens: built in %.1f s", name, tokens, time.perf_counter() - started)
        for batch in islice(batches, o.steps):
            started = time.perf_counter()
            losses.append(step([batch]))
            if on_gpu:
                torch.cuda.synchronize()
            times.append(time.perf_counter() - started)
    except torch.cuda.OutOfMemoryError:
        return None
    logger.info("%s, %d tokens: steps of %s s", name, tokens, ", ".join(f"{seconds:.3g}" for seconds in times))
    memory, seconds = torch.cuda.max_memory_allocated() / 2**30 if on_gpu else 0.0, statistics.median(times[WARM_UP:])
    placer = TokenPlacer(rows, choose_device("auto"), "auto")
    costs = input_costs(placer, next(batches), seconds) if name == OURS and o.input_costs else {}
    return Measured([float(loss) for loss in losses], seconds, memory, costs)


def compare(o: Options, tokens: int, names: list[str], recorder: Recorder | None) -> None:
    """Measure every runner at one length and record it beside the first."""
    shape = o.run(tokens).model
    assert shape is not None
    first: Measured | None = None
    rows = PackedRows(o.case, tokens, TAG_IDS[0], 0, 1)
    labels = next(iter(rows))["r"].to(choose_device("auto"))  # a GPU counts in no time, a CPU takes seconds
    pairs = int(LayoutParams.from_labels(labels).num_visible_pairs())
    for name in names:
        rows.load_state_dict({"rows": 0})
        found = measure(o, name, tokens, iter(rows), rows)
        first = first or found
        case = {"runner": name, "tokens": tokens, "case": o.case, "model": f"{o.model}, {o.num_layers} layers"}
        if found is None or first is None:
            report(recorder, {**case, "result": "out of memory"})
        elif name != OTHER_MODEL and difference(found, first) > TOLERANCE[o.dtype]:
            print(f"NOT RECORDED, its losses are others: {case} {found.losses}, first: {first.losses}", flush=True)
        else:
            numbers = {
                "s_per_step": found.seconds,
                "tokens_per_s": tokens / found.seconds,
                "model_tflops": training_flops(shape, tokens, pairs) / found.seconds / 1e12,
                "peak_gib": found.memory_gib,
                "time_beside_ours": found.seconds / first.seconds,
                "last_loss": found.losses[-1],
            }
            report(recorder, {**case, "result": "ran", **numbers, **found.input_costs})
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def difference(found: Measured, first: Measured) -> float:
    """Largest relative one of the losses of two runners."""
    return max(abs(a - b) / b for a, b in zip(found.losses, first.losses, strict=True))


def report(recorder: Recorder | None, values: dict[str, Any]) -> None:
    """Record a row, or print it where nothing is recorded."""
    if recorder is None:
        print(values, flush=True)
    else:
        recorder.add(**values)


def chosen(o: Options) -> list[str]:
    """The runners to measure. Raises ConfigError for names that there are not."""
    if unknown := [name for name in o.runners if name not in RUNNERS]:
        raise ConfigError(f"runners {unknown} unknown, allowed: {', '.join(RUNNERS)}")
    if o.steps <= WARM_UP:
        raise ConfigError(f"steps must be above {WARM_UP}, which are not timed, got {o.steps}")
    return o.runners or [name for name in RUNNERS if torch.cuda.is_available() or name not in NEED_A_GPU]


def main() -> None:
    """Measure all lengths."""
    o = parse_options(Options)
    names = chosen(o)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    logging.getLogger("megatron").setLevel(logging.WARNING)
    recorder = None
    if torch.cuda.is_available() and not o.tiny:
        command = "python -m benchmarks.training_beside_transformers"
        key = ("runner", "tokens", "case", "model")
        recorder = Recorder(
            "training_beside_transformers", o.output or str(RESULTS), o.commit, key=key, command=command
        )
    for tokens in o.tokens:
        compare(o, tokens, names, recorder)
    if recorder is not None:
        recorder.table(
            "Training steps (forward, backward, optimizer) of one model from the same weights on the same packed rows, "
            f"one row a step, on one GPU; median of the steps after the first {WARM_UP}. model_tflops counts visible "
            "pairs; time_beside_ours is the time of a step divided by that of the first runner at this length in the "
            "same call; scan_and_data_share is what laying out a row on the GPU and waiting for the loader take of our "
            "step."
        )


if __name__ == "__main__":
    run_tool(main)
