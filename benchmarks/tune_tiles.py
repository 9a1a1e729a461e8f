"""Searches tile sizes of the products of a decode step, by the time of whole steps, on one GPU.

A product that is fastest by itself can leave the launch behind it less room to start early, so what counts is the
median step of an engine that decodes. One product's tiles are changed at a time, and kept where two measurements are
shorter than the best so far. Prints each improvement, and at the end the tiles to use: `choose_tiles` of
kernels/fused_linear/tiles.py has those of an H200. Random weights; half precision; up to 32 requests.

    python -m benchmarks.tune_tiles --model-preset qwen2.5-1.5b --batch 1
    python -m benchmarks.tune_tiles --model-preset qwen2.5-7b --batch 8 --products gate_up,down --seconds 100
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from megatron_multiverse.cli import parse_options, run_tool
from megatron_multiverse.config import ModelConfig
from megatron_multiverse.errors import ConfigError
from megatron_multiverse.inference.bench import BenchConfig, decode_step
from megatron_multiverse.inference.bench_model import random_model
from megatron_multiverse.kernels.fused_linear import MAX_ROWS
from megatron_multiverse.kernels.fused_linear.tiles import TILES, ProductShape, choose_tiles
from megatron_multiverse.model.device import choose_device, device_name
from megatron_multiverse.model.families import preset

Name = Literal["gate_up", "down", "qkv", "output", "vocabulary"]
Tiles = tuple[int, ...]
NAMES = ("BLOCK_OUT", "BLOCK_K", "SPLITS", "num_stages", "num_warps", "PREFETCH")
"""What the numbers of tiles mean: rows of the weights per program, depth of a tile, programs that share a sum, tiles in
flight, warps, bytes of each row asked for before the wait."""
CHOICES = (
    (16, 32, 64, 128),
    (64, 128, 256),
    (1, 2, 3, 4, 5, 6, 8, 10, 12),
    (2, 3, 4, 5, 6),
    (2, 4, 8),
    (0, 128, 256, 512),
)
"""The numbers that are tried, of each."""
TOGETHER = ((2,), (5,), (0, 2), (1, 3), (4,), (3,))
"""Those that are changed together, one group after the other."""
CLEARLY = 0.997
"""Times of a first measurement over the best so far that are worth a second one."""
SHARED_BYTES = 227 << 10
"""Of a multiprocessor's shared memory, for the tiles in flight."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is searched."""

    model_preset: str = "qwen2.5-7b"
    """Published shape; model/families.py lists them."""
    num_layers: int | None = None
    """Fewer layers, for models that do not fit."""
    batch: int = 1
    """Requests at once; tiles are shared by up to 16, and by 17 to 32."""
    context: int = 1024
    """Tokens of each prompt."""
    new_tokens: int = 56
    """Tokens that each request writes in a measurement."""
    products: tuple[Name, ...] = ("gate_up", "down", "qkv", "output", "vocabulary")
    """In this order, and as often as they stand here: what is best for one depends on the others."""
    seconds: float = 300.0
    """Time for the search; kernels compiled in between count."""
    output: Path | None = None
    """JSON file for all measurements."""

    def __post_init__(self) -> None:
        if not 1 <= self.batch <= MAX_ROWS:
            raise ConfigError(
                f"batch must be 1 to {MAX_ROWS}, since more rows are multiplied by cuBLAS, got {self.batch}"
            )


def products(shape: ModelConfig, batch: int) -> dict[Name, ProductShape]:
    """The products of a step of a model in half precision, on one GPU."""
    hidden, ffn, dim = shape.hidden_size, shape.ffn_hidden_size, shape.kv_channels
    heads = shape.num_attention_heads
    lanes = max(16, 1 << (batch - 1).bit_length())

    def product(depth: int, width: int, *, swiglu: bool = False, parted: bool = False) -> ProductShape:
        return ProductShape(depth, width, swiglu, parted, lanes, 2)

    return {
        "gate_up": product(hidden, ffn, swiglu=True),
        "down": product(ffn, hidden, parted=True),
        "qkv": product(hidden, (heads + 2 * shape.num_query_groups) * dim),
        "output": product(heads * dim, hidden, parted=True),
        "vocabulary": product(hidden, shape.vocab_size),
    }


def neighbours(tiles: Tiles, product: ProductShape, group: tuple[int, ...]) -> Iterator[Tiles]:
    """Other tiles that differ in the numbers of a group alone and fit into shared memory."""
    for numbers in itertools.product(*(CHOICES[number] for number in group)):
        other = list(tiles)
        for number, value in zip(group, numbers, strict=True):
            other[number] = value
        out, k, splits, stages, *_ = other
        fits = (out + product.lanes) * k * product.itemsize * stages <= SHARED_BYTES
        # Wide products have programs enough; else each of those that share a sum has some of its depth.
        is_wide = product.swiglu or product.width >= 1 << 14
        divides = splits == 1 or (splits * k <= product.depth and not is_wide)
        if fits and divides and tuple(other) != tiles:
            yield tuple(other)


def search(
    measure: Callable[[Mapping[ProductShape, Tiles]], float],
    order: list[ProductShape],
    start: Mapping[ProductShape, Tiles],
    *,
    has_time: Callable[[], bool],
    say: Callable[[ProductShape, Tiles, float], None],
) -> tuple[dict[ProductShape, Tiles], float]:
    """Change the tiles of one product after the other while that makes a step shorter.

    Args:
        measure: the time of a step with such tiles; infinite if they do not run.
        order: which products, in their order.
        start: tiles of all of them to begin with.
        has_time: whether to go on.
        say: is told each improvement.

    Returns:
        The best tiles, and their time.
    """
    best = dict(start)
    shortest = min(measure(best), measure(best))
    for product in order:
        tried = {best[product]}
        improved = True
        while improved:
            improved = False
            for group in TOGETHER:
                for tiles in list(neighbours(best[product], product, group)):
                    if tiles in tried or not has_time():
                        continue
                    tried.add(tiles)
                    other = best | {product: tiles}
                    time_ = measure(other)
                    if time_ < CLEARLY * shortest and max(time_, again := measure(other)) < shortest:
                        best, shortest, improved = other, max(time_, again), True
                        say(product, tiles, shortest)
    return best, shortest


class Steps:
    """Measures steps of an engine with given tiles, and remembers what it measured."""

    def __init__(self, options: Options, shape: ModelConfig) -> None:
        self.options, self.shape = options, shape
        self.device = choose_device("auto")
        self.model = random_model(shape, torch.bfloat16, self.device)
        self.bench = BenchConfig(
            model_preset=options.model_preset, context=options.context, new_tokens=options.new_tokens
        )
        self.measured: list[dict[str, Any]] = []

    def __call__(self, tiles: Mapping[ProductShape, Tiles]) -> float:
        """Milliseconds."""
        TILES.clear()
        TILES.update({product: dict(zip(NAMES, numbers, strict=True)) for product, numbers in tiles.items()})
        try:
            milliseconds = 1e3 * decode_step(self.model, self.shape, self.bench, self.options.batch)
        except ConfigError:
            raise
        except Exception as error:  # whatever a compiler says of tiles that it cannot make
            self.measured.append({"error": " ".join(str(error).split())[:200]})
            milliseconds = float("inf")
        else:
            self.measured.append({"ms": round(milliseconds, 4)})
        self.measured[-1]["tiles"] = [[*product, *numbers] for product, numbers in tiles.items()]
        return milliseconds


def main() -> None:
    """Search, and print what was found."""
    options = parse_options(Options)
    if choose_device("auto").type != "cuda":
        raise ConfigError("tiles are searched on a CUDA GPU, none is visible: run it on a machine that has one")
    if options.output:  # what cannot be written there is said before the search, not after it
        options.output.write_text("", encoding="utf-8")
    shape = preset(options.model_preset)
    shape = dataclasses.replace(shape, num_layers=options.num_layers or shape.num_layers)
    names = products(shape, options.batch)
    start = {product: tuple(choose_tiles(product)[name] for name in NAMES) for product in names.values()}
    steps = Steps(options, shape)
    named = {product: name for name, product in names.items()}
    steps(start)  # compiles
    began = time.monotonic()
    first = steps(start)
    print(
        f"{device_name(steps.device)}, {options.model_preset}, batch {options.batch}: {first:.4f} ms a step", flush=True
    )
    best, shortest = search(
        steps,
        [names[name] for name in options.products],
        start,
        has_time=lambda: time.monotonic() - began < options.seconds,
        say=lambda product, tiles, ms: print(f"{ms:.4f} ms  {named[product]} {_text(tiles)}", flush=True),
    )
    print(f"{shortest:.4f} ms after {len(steps.measured)} measurements, {shortest / first:.3f} of the first")
    for product, tiles in best.items():
        changed = "" if tiles == start[product] else f", before {_text(start[product])}"
        print(f"  {named[product]}: {_text(tiles)}{changed}")
    if options.output:
        about = {"gpu": device_name(steps.device), "options": asdict(options), "names": [*ProductShape._fields, *NAMES]}
        options.output.write_text(
            json.dumps(about | {"measured": steps.measured}, default=str) + "\n", encoding="utf-8"
        )


def _text(tiles: Tiles) -> str:
    return ", ".join(f"{name} {number}" for name, number in zip(NAMES, tiles, strict=True))


if __name__ == "__main__":
    run_tool(main)
