"""Steps of a model so small that a GPU waits for the host: text, and the paths of blocks.

Prints, for each case, how long a step takes, how long the host works on it without waiting for tokens, and how long
the GPU takes for its graph alone. Weights are random; blocks begin with a given header, so that they fork. The model
has the shape of examples/paper_in_miniature unless a preset is named.

    python -m benchmarks.small_steps
    python -m benchmarks.small_steps --cases [1x0,1x4] --model-preset qwen2.5-0.5b
"""

from __future__ import annotations

import json
import re
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_multiverse.cli import parse_options, run_tool
from megatron_multiverse.config import EngineConfig, ModelConfig, SamplingParams
from megatron_multiverse.errors import ConfigError
from megatron_multiverse.inference import Engine, Request
from megatron_multiverse.inference.bench_model import random_model, random_prompt
from megatron_multiverse.inference.bench_script import VOCAB, block_header
from megatron_multiverse.inference.step.runner import PendingOutput
from megatron_multiverse.model.device import choose_device, device_name
from megatron_multiverse.model.families import preset

MINIATURE = ModelConfig(
    num_layers=6,
    hidden_size=512,
    ffn_hidden_size=1408,
    num_attention_heads=8,
    num_query_groups=8,
    kv_channels=64,
    vocab_size=320,
    max_sequence_length=8192,
    qk_layernorm=True,
    share_embeddings_and_output_weights=False,
)


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is measured."""

    cases: tuple[str, ...] = ("1x0", "1x4", "1x8", "32x0", "128x0")
    """Requests x paths of a block in each; 0 paths are text."""
    context: int = 300
    """Tokens of each prompt."""
    new_tokens: int = 400
    """Tokens of each text or path."""
    rounds: int = 3
    """Measurements of each case, all written; one more comes first, for what is compiled."""
    model_preset: str | None = None
    """Published shape in place of the miniature's; model/families.py lists them."""
    commit: str = ""
    """Kept with the figures."""
    output: Path | None = None
    """JSON file for the figures."""

    def __post_init__(self) -> None:
        if unknown := [case for case in self.cases if not re.fullmatch(r"[1-9]\d*x\d+", case)]:
            raise ConfigError(f"cases {unknown}: name each as REQUESTSxPATHS, such as 1x4, or 32x0 for text")
        for name in ("context", "new_tokens", "rounds"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")


@contextmanager
def waiting_watched() -> Iterator[list[float]]:
    """Seconds that the host has waited for tokens so far, in the only entry of what is given."""
    waited, wait = [0.0], PendingOutput.wait

    def watched(output: PendingOutput) -> Any:
        start = time.perf_counter()
        found = wait(output)
        waited[0] += time.perf_counter() - start
        return found

    PendingOutput.wait = watched  # type: ignore[assignment, method-assign]
    try:
        yield waited
    finally:
        PendingOutput.wait = wait  # type: ignore[method-assign]


def run_once(engine: Engine, shape: ModelConfig, options: Options, requests: int, paths: int) -> dict[str, Any]:
    """Medians over the steps in which as many branches run as ever, and all of the answers' time."""
    tokens = options.new_tokens
    if paths:
        most = (paths + 1) * (tokens + 64) + 256
        sampling = SamplingParams(max_tokens=most, max_critical_tokens=tokens + 256, branch_max_tokens=tokens)
    else:
        sampling = SamplingParams(max_tokens=tokens, ignore_eos=True, max_depth=0)
    header = block_header(paths) if paths else ()
    for number in range(requests):
        prompt = random_prompt(options.context, shape, number)
        engine.add_request(Request(prompt_ids=prompt, sampling=sampling, answer_start=header))
    steps: list[tuple[int, float, float]] = []
    with waiting_watched() as waited:
        while engine.has_work:
            live, before, start = len(engine.scheduler.places.nodes), waited[0], time.perf_counter()
            engine.step()
            seconds = time.perf_counter() - start
            steps.append((live, seconds, seconds - (waited[0] - before)))
    most_live = max(live for live, _, _ in steps)
    full = [(seconds, host) for live, seconds, host in steps if live == most_live]
    return {
        "ms_per_step": round(1e3 * statistics.median(seconds for seconds, _ in full), 4),
        "host_ms": round(1e3 * statistics.median(host for _, host in full), 4),
        "steps": len(steps),
        "steps_of_all_branches": len(full),
        "total_ms": round(1e3 * sum(seconds for _, seconds, _ in steps), 2),
    }


def graph_times(engine: Engine) -> dict[str, float]:
    """Milliseconds of each graph, replayed a hundred times, as the last step left its input. It is named by its tokens,
    items of attention, queries per item, parts per query and draw, since a case may have several of one size."""
    found: dict[str, float] = {}
    graphs = {} if engine.runner.graphs is None else engine.runner.graphs.graphs
    for kind, graph in graphs.items():
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        graph.replay()
        begin.record()
        for _ in range(100):
            graph.replay()
        end.record()
        end.synchronize()
        found["/".join(map(str, astuple(kind)))] = round(begin.elapsed_time(end) / 100, 4)
    return found


def measure(options: Options) -> Iterator[dict[str, Any]]:
    """A row for each case."""
    device = choose_device("auto")
    shape = MINIATURE if options.model_preset is None else preset(options.model_preset)
    model = random_model(shape, torch.bfloat16 if device.type == "cuda" else torch.float32, device)
    for case in options.cases:
        requests, paths = map(int, case.split("x"))
        rows = requests * (paths + 1)
        tokens = requests * (options.context + 200) + rows * (options.new_tokens + 96)
        config = EngineConfig(num_pages=tokens // 16, max_rows=max(rows, 8), prefix_cache=False)
        engine = Engine(model, VOCAB, config, vocab_size=shape.vocab_size)
        runs = [run_once(engine, shape, options, requests, paths) for _ in range(1 + options.rounds)][1:]
        best = min(runs, key=lambda run: float(run["ms_per_step"]))
        yield {"case": case, **best, "runs": runs, "graph_ms": graph_times(engine)}
        engine.runner.close()


def main() -> None:
    options = parse_options(Options)
    torch.set_num_threads(1)
    name = device_name(choose_device("auto"))
    report: dict[str, Any] = {"commit": options.commit, "date": time.strftime("%Y-%m-%d"), "device": name}
    report |= {"torch": torch.__version__, "options": asdict(options) | {"output": str(options.output)}, "cases": []}
    for row in measure(options):
        report["cases"].append(row)
        print(
            f"{row['case']:>7}: {row['ms_per_step']:.3f} ms a step, host {row['host_ms']:.3f}, graphs", row["graph_ms"]
        )
        if options.output is not None:
            options.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run_tool(main)
