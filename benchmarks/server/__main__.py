"""Measures what HTTP costs, on a GPU or a CPU, with random weights: no trained model, no network.

Example:
    python -m benchmarks.server --model-preset qwen2.5-7b --output runs/server.json
    python -m benchmarks.server --model-preset tiny --dtype float32 --context 64 --new-tokens 64 --batch 1 8
    python -m benchmarks.server --parts forks --model-preset qwen2.5-7b --batch 1 8 32
    python -m benchmarks.server --parts stalls --device cpu
    python -m benchmarks.server --parts bodies --device cpu
    python -m benchmarks.server --parts reprefill

overhead: tokens per second of the server, whole answers and streams, beside those of `Engine` in this process, for the
same requests at once; and the time to the first token of a request that is alone. The engine of the server is the same
build over the same weights, which lie in a temporary folder. forks: answers that begin with a block of equal paths, in
closed and open loop, and with one path at a time. stalls: how long the engine's steps take while clients
disturb the HTTP process, beside how long they take without them (the quickstart's model). bodies: how long a stream
stands still while large bodies of others are read (the same model). reprefill: the same model served as a stock engine
would, beside the engine: right answers, work, and how far log-probabilities move.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megatron_multiverse.checkout import commit_here
from megatron_multiverse.cli import parse_options, run_tool
from megatron_multiverse.config.choices import DType


@dataclass(frozen=True, kw_only=True)
class ServerBenchConfig:
    """What is measured."""

    parts: tuple[Literal["overhead", "forks", "stalls", "bodies", "reprefill"], ...] = ("overhead",)
    """Measurements to make."""
    model_preset: str = "qwen2.5-1.5b"
    """overhead, forks: published shape; model/families.py lists them."""
    dtype: DType = "bf16"
    """overhead, forks: of weights and cache."""
    batch: tuple[int, ...] = (1, 32)
    """overhead, forks: requests at once."""
    context: int = 1024
    """overhead, forks: tokens of each prompt; no two begin alike."""
    new_tokens: int = 256
    """overhead: tokens that each request writes. forks: those of each path."""
    branches: int = 8
    """forks: paths of the block."""
    requests: int = 32
    """forks: answers in each case."""
    load: tuple[float, ...] = (0.5, 0.9)
    """forks: clients per second in the open loop, as shares of the answers per second of the largest closed loop."""
    prompt: int = 1024
    """overhead: tokens of the prompt whose first token is waited for."""
    repeats: int = 5
    """overhead: measurements of each case after one that does not count; all are reported. forks: no warm-up. bodies:
    bodies of each kind."""
    teraflops: float = 790.0
    """overhead: what the device computes at most, for the bound of the first token; default: an H200 in bf16."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """stalls, bodies: of the engine; auto takes CUDA when there is a GPU."""
    seconds: float = 20.0
    """stalls: of each stretch, with and without disturbance, in turns."""
    turns: int = 3
    """stalls: stretches of each kind."""
    output: Path | None = None
    """JSON file for all figures."""


def main() -> None:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # as the server that it starts has it
    from benchmarks.server.bodies import measure_bodies
    from benchmarks.server.forks import measure_forks
    from benchmarks.server.overhead import measure_overhead
    from benchmarks.server.reprefill import measure_reprefill
    from benchmarks.server.stalls import measure_stalls

    config = parse_options(ServerBenchConfig)
    report: dict[str, Any] = {"date": time.strftime("%Y-%m-%d"), "commit": commit_here() or ""}
    if "overhead" in config.parts:
        report["overhead"] = measure_overhead(config)
    if "forks" in config.parts:
        report["forks"] = measure_forks(config)
    if "stalls" in config.parts:
        report["stalls"] = measure_stalls(config)
    if "bodies" in config.parts:
        report["bodies"] = measure_bodies(config)
    if "reprefill" in config.parts:
        report["reprefill"] = measure_reprefill()
    if config.output is not None:
        config.output.parent.mkdir(parents=True, exist_ok=True)
        config.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run_tool(main)
