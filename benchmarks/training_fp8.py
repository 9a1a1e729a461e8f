"""The loss of FP8 training beside bf16's: the same weights, rows and optimizer, one precision after the other.

Full-width layers of a published model train on packed rows in which every second word follows from the one before it,
so that there is something to learn. FP8's distance from bf16 is held against the noise of bf16: how far the same run
lies from itself, since sums are added up in another order each time; how far TransformerEngine's layers lie from local
ones, which round in other places; and how far runs lie apart whose fresh weights come from other seeds.

    python -m benchmarks.training_fp8

Without a GPU `--tiny` runs the ways that need none with a model of a few thousand parameters and records nothing.
"""

from __future__ import annotations

import gc
import logging
import sys
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks.kernels.record import Recorder
from benchmarks.training_layouts import RESULTS, WARM_UP, Measured, measure, shape_of
from benchmarks.training_layouts import Options as LayoutOptions
from benchmarks.training_rows import PackedRows
from megatron_multiverse.cli import parse_options, run_tool
from megatron_multiverse.errors import ConfigError
from megatron_multiverse.parallel.ranks import Ranks
from megatron_multiverse.training.flops import training_flops

WAYS: dict[str, dict[str, Any]] = {
    "bf16": {},
    "bf16, run again": {},
    "bf16, local layers": {"layers": {"transformer_impl": "local"}},
    **{f"bf16, seed {seed}": {"seed": seed} for seed in (1, 2, 3)},
    "fp8 hybrid, tensorwise": {"layers": {"fp8": "hybrid"}},
    "fp8 hybrid, blockwise": {"layers": {"fp8": "hybrid", "fp8_recipe": "blockwise"}},
}
"""Name -> settings of the run; the others are held against the first."""
NEED_A_GPU = ("fp8 hybrid, tensorwise", "fp8 hybrid, blockwise")


@dataclass
class Options:
    """What to train."""

    ways: list[str] = field(default_factory=list)
    """Any of those in WAYS; default all that can run here."""
    model: str = "qwen2.5-7b"
    """A published shape; model/families.py lists them."""
    num_layers: int = 4
    """Layers of it, at their full width."""
    tokens: int = 16384
    """Tokens of a packed row, a step each."""
    steps: int = 30
    """Steps of each; the first three are not timed."""
    losses_alone: bool = False
    """Record no times: something else runs on the GPU."""
    tiny: bool = False
    """A model and rows for a test without a GPU."""
    output: str | None = None
    """Folder of the results; default benchmarks/results."""
    commit: str | None = None
    """Commit to record; default that of the working tree."""

    def __post_init__(self) -> None:
        if unknown := [name for name in self.ways if name not in WAYS]:
            raise ConfigError(f"ways {unknown} unknown, allowed: {', '.join(WAYS)}")
        if self.steps <= WARM_UP:
            raise ConfigError(f"steps must be above {WARM_UP}, which are not timed, got {self.steps}")
        self.ways = self.ways or [name for name in WAYS if torch.cuda.is_available() or name not in NEED_A_GPU]


class LearnableRows(PackedRows):
    """Rows in which every second word is a function of the word before it."""

    def draw_words(self, generator: torch.Generator) -> Tensor:
        """See PackedRows.draw_words."""
        words = super().draw_words(generator)
        follower = torch.randperm(self._words, generator=torch.Generator().manual_seed(0))
        given = words[:, :-1:2]
        words[:, 1::2] = follower[given[:, : words[:, 1::2].shape[1]]]
        return words


def distances(losses: list[float], first: list[float]) -> list[float]:
    """How far each loss is from that of the first way, as a share of that."""
    return [abs(loss - other) / other for loss, other in zip(losses, first, strict=True)]


def row(o: Options, name: str, found: Measured, first: Measured) -> dict[str, Any]:
    """What is recorded of a way of computing."""
    options = LayoutOptions(model=o.model, num_layers=o.num_layers, tokens=o.tokens, tiny=o.tiny)
    apart = distances(found.losses, first.losses)
    times = {
        "s_per_step": found.seconds,
        "time_beside_first": found.seconds / first.seconds,
        "model_tflops": training_flops(shape_of(options), found.tokens, found.pairs) / found.seconds / 1e12,
    }
    return {
        "way": name,
        "model": f"{o.model}, {o.num_layers} layers",
        "rows": f"1 x {o.tokens} packed",
        **({} if o.losses_alone else times),
        "peak_gib": found.memory_gib,
        "first_loss": found.losses[0],
        "last_loss": found.losses[-1],
        "mean_distance": sum(apart) / len(apart),
        "largest_distance": max(apart),
        "losses": [round(loss, 5) for loss in found.losses],
    }


def main() -> None:
    """Train in every way."""
    o = parse_options(Options)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    logging.getLogger("megatron").setLevel(logging.WARNING)
    recorder = None
    if torch.cuda.is_available() and not o.tiny:
        command = "python -m benchmarks.training_fp8"
        output = o.output or str(RESULTS)
        recorder = Recorder("training_fp8", output, o.commit, key=("way", "model", "rows"), command=command)
    options = LayoutOptions(model=o.model, num_layers=o.num_layers, tokens=o.tokens, rows=1, steps=o.steps, tiny=o.tiny)
    first: Measured | None = None
    for name in o.ways:
        layout = {"engine": "megatron", **WAYS[name]}
        found = measure(options, shape_of(options), layout, Ranks(), LearnableRows)
        first = first or found
        values = row(o, name, found, first)
        if recorder is None:
            print(values, flush=True)
        else:
            recorder.add(**values)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    if recorder is not None:
        recorder.table(
            "Training steps (forward, backward, optimizer) of one model from the same weights on the same rows, in "
            "each precision, by engine megatron on one GPU. Distances: of each step's loss from that of the first way, "
            f"relative. Times: median of {o.steps - WARM_UP} steps."
        )


if __name__ == "__main__":
    run_tool(main)
