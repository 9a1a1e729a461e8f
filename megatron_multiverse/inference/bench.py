"""Times the engine over fixed work, with random weights: what tools/bench_engine.py does."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from megatron_multiverse.config import EngineConfig, ModelConfig, SamplingParams
from megatron_multiverse.config.choices import DType, Quantization
from megatron_multiverse.dtypes import DTYPES
from megatron_multiverse.errors import ConfigError
from megatron_multiverse.inference.bench_blocks import joint, silence_tags, speedup, work_for
from megatron_multiverse.inference.bench_model import copy_rate, prompt_lengths, random_model, random_prompt
from megatron_multiverse.inference.bench_report import (
    report_fork,
    report_joint,
    report_law,
    report_prompt,
    report_speedup,
    report_steps,
)
from megatron_multiverse.inference.bench_script import CONCLUSION, VOCAB, Script, block_script
from megatron_multiverse.inference.engine import Engine
from megatron_multiverse.inference.step.model_ranks import ModelRanks
from megatron_multiverse.inference.step.runner import Runner
from megatron_multiverse.inference.step.sampler import Sampler
from megatron_multiverse.inference.text.request import Request
from megatron_multiverse.inference.text.result import Result
from megatron_multiverse.model.device import choose_device, device_name
from megatron_multiverse.model.families import preset

SETTLE = 8
"""First steps of a measurement that are left out."""


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """What is timed."""

    model_preset: str = "qwen2.5-7b"
    """Published shape; model/families.py lists them."""
    num_layers: int | None = None
    """Fewer layers, for a quick look."""
    dtype: DType = "bf16"
    """Of weights and cache."""
    parts: tuple[Literal["prompt", "decode", "fork", "joint", "speedup"], ...] = ("decode",)
    """What to measure."""
    prompts: tuple[int, ...] = (1024, 16384)
    """Tokens of a prompt whose first token is waited for, alone."""
    batch: tuple[int, ...] = (1, 8, 32, 128)
    """Requests at once."""
    context: int = 1024
    """Tokens of each prompt."""
    shortest_context: int | None = None
    """decode: tokens of the shortest prompt, if lengths are to differ: evenly up to --context, in mixed order."""
    new_tokens: int = 128
    """Tokens that each request writes."""
    fork_prefix: int = 16384
    """Tokens before the block."""
    fork_branches: int = 8
    """Paths of the block."""
    fork_tokens: int = 512
    """Tokens of each path."""
    num_parallel: tuple[float, ...] = (1.0, 1.2, 1.5, 2.0, 4.0)
    """speedup: tokens of an answer per token of its longest chain."""
    answer_tokens: int = 512
    """speedup: tokens of each answer."""
    temperature: float = 0.0
    """decode: how tokens are drawn; 0 is greedy."""
    top_k: int = 0
    """decode: most likely tokens to draw from; 0 is off."""
    top_p: float = 1.0
    """decode: their probability in sum; 1 is off."""
    repeats: int = 3
    """Measurements of each case; the median counts, all are printed."""
    cuda_graphs: bool = True
    """Replay small steps as CUDA graphs."""
    quantization: Quantization = "none"
    """fp8: weights of attention and MLP in eight bits."""
    page_size: int = 16
    """Tokens per page of the cache."""
    tensor_model_parallel_size: int = 1
    """GPUs that share the model; start one process for each with torchrun."""
    output: Path | None = None
    """JSON file for all figures."""

    def __post_init__(self) -> None:
        sizes = ("prompts", "batch", "context", "new_tokens", "fork_prefix", "fork_branches", "fork_tokens")
        for name in (*sizes, "num_parallel", "answer_tokens", "repeats"):
            value = getattr(self, name)
            least = min(value, default=1) if isinstance(value, tuple) else value
            if least < 1:
                raise ConfigError(f"{name} must be at least 1, got {least}")
        if self.shortest_context is not None and not 0 < self.shortest_context <= self.context:
            raise ConfigError(
                f"shortest_context must be from 1 to context, {self.context}, got {self.shortest_context}"
            )


def measure(config: BenchConfig) -> Iterator[dict[str, Any]]:
    """One row of figures per case, on the first rank.

    Raises:
        ConfigError: a part that runs on one GPU is asked of several, or there are too few steps to measure.
    """
    first = ModelRanks.current().is_first
    device = choose_device("auto")
    shape = preset(config.model_preset)
    if config.num_layers:
        shape = dataclasses.replace(shape, num_layers=config.num_layers)
    model = random_model(shape, DTYPES[config.dtype], device)
    copy = copy_rate(device)
    if first:
        gpus = f"{config.tensor_model_parallel_size} x " if config.tensor_model_parallel_size > 1 else ""
        print(
            f"{gpus}{device_name(device)}, {config.model_preset}, {config.dtype}; a copy moves {copy / 1e12:.2f} TB/s"
        )
    if "prompt" in config.parts:
        for length in config.prompts:
            runs = first_tokens(model, shape, config, length)
            if first:
                yield report_prompt(length, runs)
    if "decode" in config.parts:
        for batch in config.batch:
            runs = [decode_step(model, shape, config, batch) for _ in range(config.repeats)]
            size = step_bytes(shape, config, sum(context_lengths(config, batch)))
            if first:
                yield report_steps(f"decode, batch {batch}", runs, size=size, copy=copy, rows=batch)
    if "fork" in config.parts:
        forks = [fork_step(model, shape, config, at_once=True) for _ in range(config.repeats)]
        _, serial = fork_step(model, shape, config, at_once=False)
        if first:
            size = step_bytes(shape, config, config.fork_prefix + config.fork_branches * config.fork_tokens // 2)
            yield report_fork(forks, serial, size=size, copy=copy, branches=config.fork_branches)
    if "joint" in config.parts or "speedup" in config.parts:
        if config.tensor_model_parallel_size > 1:
            raise ConfigError("the parts joint and speedup run on one GPU: leave --tensor-model-parallel-size out")
        yield from measure_blocks(model, shape, config)


def measure_blocks(model: torch.nn.Module, shape: ModelConfig, config: BenchConfig) -> Iterator[dict[str, Any]]:
    """The rows of the parts joint and speedup."""
    if "joint" in config.parts:
        branches, tokens = config.fork_branches, config.fork_tokens
        pages = (config.fork_prefix + branches * (tokens + 64)) // config.page_size + 4 * branches + 64
        prompt = random_prompt(config.fork_prefix, shape, 0)
        for overlap in (None, False):
            engine = make_engine(model, shape, config, pages=pages, rows=branches + 1, overlap=overlap)
            yield report_joint([joint(engine, prompt, branches, tokens) for _ in range(config.repeats)])
            engine.runner.close()
    if "speedup" in config.parts:
        silence_tags(model)
        for batch in config.batch:
            yield from measure_speedup(model, shape, config, batch)


def measure_speedup(
    model: torch.nn.Module, shape: ModelConfig, config: BenchConfig, batch: int
) -> Iterator[dict[str, Any]]:
    """Rows for each num_parallel, and the law fitted to them."""
    works = [work_for(x, config.answer_tokens) for x in config.num_parallel]
    most = max(work.branches for work in works)
    tokens = config.context + config.answer_tokens + 64 + 32 * most
    # Twice: what earlier cases leave in the prefix cache is taken only once all other pages are.
    pages = 2 * batch * (-(-tokens // config.page_size) + 3 * most)
    engine = make_engine(model, shape, config, pages=pages, rows=batch * (most + 1))
    prompts = [random_prompt(config.context, shape, number) for number in range(batch)]
    one = SamplingParams(max_tokens=1, ignore_eos=True)
    engine.generate([Request(prompt_ids=prompt, sampling=one) for prompt in prompts])  # the prefix cache has them now
    rows = []
    for x in config.num_parallel:
        rows.append(report_speedup(speedup(engine, prompts, x, config.answer_tokens, config.repeats)))
        yield rows[-1]
    engine.runner.close()
    if len(rows) > 1:
        yield report_law(rows)


def follows(model: torch.nn.Module, config: BenchConfig, sampler: Sampler | None = None) -> bool:
    """On all ranks but the first: run one case as that rank says. Whether this is one of them."""
    if ModelRanks.current().is_first:
        return False
    Runner(model, num_pages=0, page_size=0, sampler=sampler, cuda_graphs=config.cuda_graphs).follow()
    return True


def first_tokens(model: torch.nn.Module, shape: ModelConfig, config: BenchConfig, length: int) -> list[float]:
    """Seconds from a request to its first token, of requests one after the other."""
    if follows(model, config):
        return []
    engine = make_engine(model, shape, config, pages=-(-length // config.page_size) + 2, rows=1)
    runs = []
    for number in range(config.repeats + 1):
        engine.add_request(
            Request(prompt_ids=random_prompt(length, shape, number), sampling=SamplingParams(max_tokens=1))
        )
        start = time.perf_counter()
        while engine.has_work:
            engine.step()
        runs.append(time.perf_counter() - start)
    engine.runner.close()
    return runs[1:]  # the first one compiles


def decode_step(model: torch.nn.Module, shape: ModelConfig, config: BenchConfig, batch: int) -> float:
    """Median seconds per step of `batch` requests that write plain text.

    Raises:
        ConfigError: too few steps in which all of them write.
    """
    if follows(model, config):
        return 0.0
    tokens = config.context + config.new_tokens + 1
    engine = make_engine(model, shape, config, pages=batch * (-(-tokens // config.page_size) + 1), rows=batch)
    sampling = SamplingParams(
        max_tokens=config.new_tokens,
        ignore_eos=True,
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
    )
    for number, length in enumerate(context_lengths(config, batch)):
        engine.add_request(Request(prompt_ids=random_prompt(length, shape, number), sampling=sampling))
    times = list(step_times(engine, batch=batch))
    engine.runner.close()
    if len(times) <= SETTLE:
        enough = -(-batch * config.context // engine.config.max_step_tokens) + 2 * SETTLE
        raise ConfigError(
            f"decode, batch {batch}: all requests wrote at once in {len(times)} steps, of which the first {SETTLE} do "
            f"not count. Those that come first have written their {config.new_tokens} tokens while the last prompts of "
            f"{config.context} are read: try --new-tokens {max(enough, config.new_tokens + SETTLE)}"
        )
    return statistics.median(times[SETTLE:])


def context_lengths(config: BenchConfig, batch: int) -> list[int]:
    """Tokens of the prompts of so many requests."""
    shortest = config.context if config.shortest_context is None else config.shortest_context
    return prompt_lengths(shortest, config.context, batch)


def fork_step(model: torch.nn.Module, shape: ModelConfig, config: BenchConfig, *, at_once: bool) -> tuple[float, float]:
    """(median seconds per step within the paths, seconds from the fork to the end of the conclusion); the first is 0
    for one path after the other.

    Raises:
        ConfigError: too few steps within the paths.
    """
    branches, tokens = config.fork_branches, config.fork_tokens
    script = Script(block_script(branches, tokens))
    if follows(model, config, script):
        return 0.0, 0.0
    most = branches * (tokens + 64) + CONCLUSION + 512
    pages = -(-(config.fork_prefix + most) // config.page_size) + 4 * branches + 16
    engine = make_engine(model, shape, config, pages=pages, rows=branches + 1)
    engine.runner.sampler = script
    sampling = SamplingParams(max_tokens=most, max_concurrent_branches=None if at_once else 1)
    engine.add_request(Request(prompt_ids=random_prompt(config.fork_prefix, shape, 0), sampling=sampling))
    times: list[float] = []
    inside: list[float] = []
    done: list[Result] = []
    while not done:
        live = len(engine.scheduler.places.nodes)
        start = time.perf_counter()
        done = engine.step()
        seconds = time.perf_counter() - start
        if times or max(live, len(engine.scheduler.places.nodes)) > 1:  # the step that forks counts
            times.append(seconds)
        if live > branches and at_once:
            inside.append(seconds)
    engine.runner.close()
    assert len(done[0].blocks) == 1 and done[0].finish_reason == "stop", "the script did not play as written"
    if at_once and len(inside) <= SETTLE:
        raise ConfigError(
            f"fork: {len(inside)} steps within the paths, of which the first {SETTLE} do not count, with --fork-tokens "
            f"{tokens}: try {tokens + 2 * SETTLE}"
        )
    return statistics.median(inside[SETTLE:]) if at_once else 0.0, sum(times)


def make_engine(
    model: torch.nn.Module,
    shape: ModelConfig,
    config: BenchConfig,
    *,
    pages: int,
    rows: int,
    overlap: bool | None = None,
) -> Engine:
    """An engine of the asked size. A block's paths start in the step that feeds `</Goal>`, if that leaves them rows."""
    engine = EngineConfig(
        num_pages=pages,
        page_size=config.page_size,
        max_rows=max(rows, 8),
        cuda_graphs=config.cuda_graphs,
        overlap=overlap,
        quantization=config.quantization,
    )
    return Engine(model, VOCAB, engine, vocab_size=shape.vocab_size, max_position=1 << 20)


def step_times(engine: Engine, *, batch: int) -> Iterator[float]:
    """Seconds of every step in which all requests write a token."""
    while engine.has_work:
        before = sum(len(state.root.ids) > state.root.prompt_length for state in engine.scheduler.active)
        start = time.perf_counter()
        engine.step()
        if before == batch:
            yield time.perf_counter() - start


def step_bytes(shape: ModelConfig, config: BenchConfig, cached_tokens: int) -> int:
    """Bytes that a decode step reads at least on each GPU: weights without the embedding, cached keys and values."""
    width = DTYPES[config.dtype].itemsize
    heads, groups, dim, hidden = shape.num_attention_heads, shape.num_query_groups, shape.kv_channels, shape.hidden_size
    layer = hidden * (heads + 2 * groups) * dim + heads * dim * hidden + 3 * hidden * shape.ffn_hidden_size
    products = shape.num_layers * layer * (1 if config.quantization == "fp8" else width)
    cached = 2 * shape.num_layers * groups * dim * cached_tokens
    return (products + width * (shape.vocab_size * hidden + cached)) // config.tensor_model_parallel_size
