"""Host time of every kind of step in the life of a request that forks and joins: what a small model on a GPU waits for.

    python -m benchmarks.bench_host_blocks --answers 300 --output benchmarks/results/host_blocks_cpu.json --label NAME

An engine of the shape of examples/paper_in_miniature runs its steps as on a GPU, with overlap and by graphs, but the
graphs compute nothing and draw what a script says. What is left is the host's work: text, plan, list of work, the
graph's arrays, copies. Answers have one block, whose paths end one after the other. Prints the smallest and the median
time of each kind of step in milliseconds; a measurement is added to those of other labels in the output.
"""

from __future__ import annotations

import gc
import json
import os
import platform
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.bench_host_step import NoModel
from megatron_multiverse.cli import parse_options, run_tool
from megatron_multiverse.config import EngineConfig, SamplingParams
from megatron_multiverse.inference import Engine, Request
from megatron_multiverse.inference.bench_script import TEXT, VOCAB, block_script
from megatron_multiverse.inference.step.graph_sizes import GraphSizes, Kind
from megatron_multiverse.inference.step.graphs import StepGraphs
from megatron_multiverse.inference.step.plan import StepPlan
from megatron_multiverse.inference.step.plan_buffer import PlanBuffer
from megatron_multiverse.inference.step.sampler import Sampler
from megatron_multiverse.inference.text.branch import Branch
from megatron_multiverse.inference.text.state import RequestState

HEADS, KV_HEADS, PROCESSORS, WEIGHTS = 8, 8, 132, 19_000_000
"""Of examples/paper_in_miniature and of an H200: what a list of work is made for."""
VOCAB_SIZE = 512
WARM_UP = 20
"""Answers before the first that counts."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """The answers."""

    paths: int = 4
    """Paths of each one's block."""
    prefix: int = 300
    """Tokens of each prompt; no two are alike."""
    path_tokens: int = 64
    """Tokens of the longest path; each one has three fewer than the one before it."""
    answers: int = 300
    """Answers, one after the other."""
    page_size: int = 16
    """Tokens per page."""
    label: str = ""
    """What was measured, such as a commit; kept with the figures."""
    output: Path | None = None
    """JSON file to add the figures to."""


class ScriptedGraphs(StepGraphs):
    """Graphs that compute nothing and draw what a script says; what is before and after them is as on a GPU."""

    def __init__(self, page_size: int, script: dict[int, list[int]]) -> None:
        self.sizes = GraphSizes(
            page_size=page_size, heads=HEADS, kv_heads=KV_HEADS, processors=PROCESSORS, weights=WEIGHTS, segments=True
        )
        self.graphs, self.replays = {}, 0
        self._temperature, self._noise, self._last = None, False, None
        self.script = script
        self.seconds = 0.0
        """Time spent on what a GPU does."""

    def _capture(self, kind: Kind) -> Any:
        self.graphs[kind] = graph = SimpleNamespace(  # type: ignore[assignment]
            kind=kind, buffer=PlanBuffer(kind, torch.device("cpu")), replay=lambda: None, last_use=0, result=None
        )
        return graph

    def _replay(self, graph: Any, plan: StepPlan, sampler: Sampler) -> Tensor:
        start = time.perf_counter()
        pairs = zip(plan.sampling.keys.tolist(), plan.sampling.indices.tolist(), strict=True)
        # A step that was planned before the end was known asks for one more, which is dropped.
        ids = [self.script[key][index] if index < len(self.script[key]) else TEXT for key, index in pairs]
        graph.result = torch.from_numpy(np.array([ids, [0] * len(ids)], dtype=np.int64))
        self.seconds += time.perf_counter() - start
        return super()._replay(graph, plan, sampler)


class Watch:
    """Tells kinds of steps apart by what is different after them; `seconds` has the time of each step by its kind."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.seconds = engine, defaultdict[str, list[float]](list)
        self._held = False
        self._came_before = "begin"
        turns: Any = engine._turns
        may_come: Callable[..., bool] = turns.may_come
        turns.may_come = lambda *args: self._note_held(may_come(*args))

    def _note_held(self, held: bool) -> bool:
        self._held = held
        return held

    def step(self) -> None:
        """Run a step."""
        engine: Any = self.engine
        before = self._counts()
        self._held = False
        busy, start = engine.runner.graphs.seconds, time.perf_counter()
        done = engine.step()
        seconds = time.perf_counter() - start - (engine.runner.graphs.seconds - busy)
        kind = self._kind(before, self._counts(), bool(done))
        self._came_before = kind
        self.seconds[kind].append(seconds)

    def _counts(self) -> tuple[int, int, int, int]:
        """Branches with a place in the cache, branches that have ended, requests that run, pages that are free."""
        scheduler = self.engine.scheduler
        states: list[RequestState] = scheduler.active
        branches: list[Branch] = [branch for state in states for branch in state.branches()]
        ended = sum(branch.finish is not None for branch in branches)
        return len(scheduler.places.nodes), ended, len(states), self.engine.book.available

    def _kind(self, before: tuple[int, ...], after: tuple[int, ...], done: bool) -> str:
        (places, ended, requests, free), (new_places, new_ended, new_requests, new_free) = before, after
        if done:
            return "end"
        if new_requests > requests:
            return "begin"
        if new_places != places:
            return "fork" if new_places > places else "join"
        if new_ended > ended:
            return "end of a path"
        if self._came_before in ("begin", "fork", "join", "end of a path"):
            return f"after {self._came_before}"
        if new_free < free:
            return "page"
        return "held" if self._held else "plain"


def make_script(options: Options) -> dict[int, list[int]]:
    """`block_script`, but that paths end one after the other."""
    script = block_script(options.paths, options.path_tokens)
    for number, key in enumerate(list(script)[1:]):
        script[key] = script[key][3 * number :]
    return script


def make_engine(options: Options) -> Engine:
    """An engine that computes nothing."""
    tokens = options.prefix + 1024 + options.paths * (options.path_tokens + options.page_size + 8)
    config = EngineConfig(num_pages=4 * tokens // options.page_size, page_size=options.page_size, overlap=True)
    engine = Engine(NoModel(VOCAB_SIZE), VOCAB, config)
    engine.runner.graphs = ScriptedGraphs(options.page_size, make_script(options))
    return engine


def measure(options: Options) -> dict[str, dict[str, float]]:
    """Of each kind of step: the smallest and the median time in milliseconds, and steps of an answer."""
    engine = make_engine(options)
    watch = Watch(engine)
    sampling = SamplingParams(max_tokens=(options.paths + 1) * (options.path_tokens + 256))
    for number in range(options.answers + WARM_UP):
        if number == WARM_UP:
            watch.seconds.clear()
            gc.collect()
        prompt = [TEXT + (number >> 8), TEXT + number % 256, *[TEXT] * (options.prefix - 2)]
        start = time.perf_counter()
        engine.add_request(Request(prompt_ids=prompt, sampling=sampling))
        watch.seconds["add"].append(time.perf_counter() - start)
        while engine.has_work:
            watch.step()
    assert len(watch.seconds["fork"]) == len(watch.seconds["join"]) == options.answers, "not as the script says"
    return {
        kind: {
            "best_ms": round(1e3 * min(times), 4),
            "median_ms": round(1e3 * statistics.median(times), 4),
            "per_answer": round(len(times) / options.answers, 2),
        }
        for kind, times in watch.seconds.items()
    }


def record(options: Options, found: dict[str, dict[str, float]], output: Path) -> None:
    """Add a measurement to the file."""
    report: dict[str, Any] = {"what": "host time of steps by kind, around graphs that compute nothing", "runs": []}
    if output.exists():
        report = json.loads(output.read_text(encoding="utf-8"))
    asked = asdict(options) | {"output": str(output)}
    versions = {"python": platform.python_version(), "torch": torch.__version__, "cores": os.cpu_count()}
    run = {"label": options.label, "date": time.strftime("%Y-%m-%d"), **versions, "options": asked, "kinds": found}
    report["runs"].append(run)
    output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    options = parse_options(Options)
    torch.set_num_threads(1)
    found = measure(options)
    for kind, row in found.items():
        print(f"{kind:>14}: {row['best_ms']:.3f} ms at best, {row['median_ms']:.3f} median, {row['per_answer']} each")
    if options.output is not None:
        record(options, found, options.output)


if __name__ == "__main__":
    run_tool(main)
