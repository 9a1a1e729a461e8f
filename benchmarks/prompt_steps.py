"""How long prompts take: seconds to the first token, by CUDA graphs and call by call, with random weights.

Each case is so many prompts of so many tokens that come at once; the time ends with the first token of the last one.
Both ways have the model and its cache to themselves in turn, and a first run for what is compiled and captured.

    python -m benchmarks.prompt_steps
    python -m benchmarks.prompt_steps --model-preset qwen2.5-7b --cases [1x300,8x1024] --profile true
"""

from __future__ import annotations

import cProfile
import itertools
import json
import pstats
import re
import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_multiverse.cli import parse_options, run_tool
from megatron_multiverse.config import EngineConfig, ModelConfig, SamplingParams
from megatron_multiverse.errors import ConfigError
from megatron_multiverse.inference import Engine, Request
from megatron_multiverse.inference.bench_model import random_model, random_prompt
from megatron_multiverse.inference.bench_script import VOCAB
from megatron_multiverse.model.device import choose_device, device_name
from megatron_multiverse.model.families import preset


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is measured."""

    cases: tuple[str, ...] = ("1x100", "1x150", "1x300", "1x500", "1x1000", "1x2000", "1x4000", "8x1024", "32x1024")
    """Prompts x tokens of each."""
    rounds: int = 5
    """Measurements of each case and way, in turn."""
    max_step_tokens: int = EngineConfig.max_step_tokens
    """Tokens of prompts per step."""
    model_preset: str = "qwen2.5-1.5b"
    """Published shape; model/families.py lists them."""
    profile: bool = False
    """Print the functions in which the host spends its time in the last case, call by call."""
    commit: str = ""
    """Kept with the figures."""
    output: Path | None = None
    """JSON file for the figures."""

    def __post_init__(self) -> None:
        if unknown := [case for case in self.cases if not re.fullmatch(r"[1-9]\d*x[1-9]\d*", case)]:
            raise ConfigError(f"cases {unknown}: name each as PROMPTSxTOKENS, such as 1x300")
        if self.rounds < 1:
            raise ConfigError(f"rounds must be at least 1, got {self.rounds}")


def first_tokens(engine: Engine, shape: ModelConfig, prompts: int, tokens: int, seeds: Iterator[int]) -> float:
    """Milliseconds until each of so many new prompts has its first token."""
    asked = [random_prompt(tokens, shape, next(seeds)) for _ in range(prompts)]
    sampling = SamplingParams(max_tokens=1, ignore_eos=True, max_depth=0)
    if engine.runner.store.keys.is_cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    for prompt in asked:
        engine.add_request(Request(prompt_ids=prompt, sampling=sampling))
    while engine.has_work:
        engine.step()
    return 1e3 * (time.perf_counter() - start)


def measure(options: Options) -> Iterator[dict[str, Any]]:
    """A row for each case and way."""
    device = choose_device("auto")
    shape, seeds = preset(options.model_preset), itertools.count()
    model = random_model(shape, torch.bfloat16 if device.type == "cuda" else torch.float32, device)
    sizes = [(int(prompts), int(tokens)) for prompts, _, tokens in (case.partition("x") for case in options.cases)]
    engines = {}
    for way in ("graphs", "calls"):
        config = EngineConfig(
            num_pages=max(prompts * (tokens // 16 + 2) for prompts, tokens in sizes),
            max_rows=max(64, *(prompts for prompts, _ in sizes)),
            max_step_tokens=options.max_step_tokens,
            prefix_cache=False,
            cuda_graphs=way == "graphs",
        )
        engines[way] = Engine(model, VOCAB, config, vocab_size=shape.vocab_size)
    for case, (prompts, tokens) in zip(options.cases, sizes, strict=True):
        runs: dict[str, list[float]] = {way: [] for way in engines}
        for number in range(1 + options.rounds):
            for way, engine in engines.items():
                milliseconds = first_tokens(engine, shape, prompts, tokens, seeds)
                runs[way] += [round(milliseconds, 3)] if number else []
        for way, times in runs.items():
            yield {"case": case, "by": way, "ms": round(statistics.median(times), 3), "runs_ms": times}
    if options.profile:
        prompts, tokens = sizes[-1]
        with cProfile.Profile() as profiler:
            first_tokens(engines["calls"], shape, prompts, tokens, seeds)
        pstats.Stats(profiler).sort_stats("tottime").print_stats(25)


def main() -> None:
    options = parse_options(Options)
    report: dict[str, Any] = {"commit": options.commit, "date": time.strftime("%Y-%m-%d")}
    report |= {"device": device_name(choose_device("auto")), "torch": torch.__version__}
    report |= {"options": asdict(options) | {"output": str(options.output)}, "rows": []}
    for row in measure(options):
        report["rows"].append(row)
        print(f"{row['case']:>9} {row['by']:6} {row['ms']:9.3f} ms  {row['runs_ms']}", flush=True)
        if options.output is not None:
            options.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run_tool(main)
