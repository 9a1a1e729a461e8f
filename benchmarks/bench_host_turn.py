"""Host time of the turns of a block: the steps that wait for `</Goal>`, or for the last `</Path>`, to be known.

    python -m benchmarks.bench_host_turn --branches 8 --prefix 16384 --answers 200

Everything else is planned while the GPU runs; here it has nothing to do from the arrival of the tokens until the next
step is launched. A script stands in for the model, which computes nothing, so what is left is the engine: writing the
text (commit), planning (plan), and what a GPU's graph needs besides, the list of work and the integers side by side
(prepare). Prints medians over the answers in milliseconds, and with `--profile` where the time goes; and how long the
list of work takes for steps of many paths of several such requests, which a fast GPU would wait for, too.
"""

from __future__ import annotations

import cProfile
import pstats
import statistics
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from benchmarks.bench_host_step import HEADS, KV_HEADS, PROCESSORS, WEIGHTS, NoModel
from benchmarks.kernels.tree_decode import Case, tables
from megatron_multiverse.cli import parse_options, run_tool
from megatron_multiverse.config import EngineConfig, SamplingParams
from megatron_multiverse.inference import Engine, Request
from megatron_multiverse.inference.bench_script import TEXT, VOCAB, Script, block_script
from megatron_multiverse.inference.bench_turns import TurnWatch
from megatron_multiverse.inference.step.graph_sizes import GraphSizes, Kind
from megatron_multiverse.inference.step.plan import StepPlan
from megatron_multiverse.inference.step.plan_buffer import PlanBuffer
from megatron_multiverse.inference.step.sampler import Sampler
from megatron_multiverse.kernels.tree_decode import Work, divide_work, most_parts, most_sharers

VOCAB_SIZE = 512


@dataclass(frozen=True, kw_only=True)
class Options:
    """The block that is forked and joined."""

    branches: int = 8
    """Paths."""
    prefix: int = 16384
    """Tokens before it."""
    path_tokens: int = 24
    """Tokens of each path."""
    answers: int = 200
    """Answers with one block each, one after the other."""
    page_size: int = 16
    """Tokens per page."""
    rows: tuple[int, ...] = (24, 96, 160)
    """Paths of the steps whose list of work is timed."""
    profile: bool = False
    """List the functions that the turns spend most time in, too; figures are higher then."""


class HostGraphs:
    """What `step/graphs.py` does on the host: the list of work, and a plan's integers side by side."""

    def __init__(self, page_size: int) -> None:
        self.sizes = GraphSizes(
            page_size=page_size,
            heads=HEADS,
            kv_heads=KV_HEADS,
            processors=PROCESSORS,
            weights=WEIGHTS,
            segments=True,
        )
        self.buffers: dict[Kind, PlanBuffer] = {}

    def prepare(self, plan: StepPlan, sampler: Sampler) -> None:
        """Make a plan ready for a graph that is not there, so that the step runs without."""
        fit = self.sizes.fit(plan, "greedy")
        if fit is None:
            return
        if fit.kind not in self.buffers:
            self.buffers[fit.kind] = PlanBuffer(fit.kind, torch.device("cpu"))
        self.buffers[fit.kind].fill(plan, fit)


def list_work(pages: Any, lengths: Any, borders: Any, page_size: int, size: int) -> Work:
    """The list of work of a graph of `size` tokens; see `divide_work`."""
    return divide_work(
        pages,
        lengths,
        borders,
        page_size=page_size,
        kv_heads=KV_HEADS,
        processors=PROCESSORS,
        slots=most_parts(size),
        sharers=most_sharers(HEADS, KV_HEADS),
    )


def measure_lists(options: Options, prefix: int = 1024, own: int = 256) -> dict[int, float]:
    """Median milliseconds of the list of work, for each of `options.rows`: paths of blocks, each after `prefix` tokens
    of its request and with `own` ones of its own."""
    found = {}
    for rows in options.rows:
        case = Case(max(rows // options.branches, 1), min(rows, options.branches), prefix, own)
        pages, lengths, _ = tables(case, options.page_size)
        times = []
        for _ in range(options.answers):
            start = time.perf_counter()
            list_work(pages, lengths, np.arange(len(lengths) + 1), options.page_size, rows)
            times.append(time.perf_counter() - start)
        found[rows] = 1000 * statistics.median(times)
    return found


def make_engine(options: Options) -> Engine:
    """An engine without a model, that writes one block an answer."""
    tokens = options.prefix + 1024 + options.branches * (options.path_tokens + options.page_size + 8)
    config = EngineConfig(
        num_pages=2 * (tokens // options.page_size + 8 * options.branches),
        page_size=options.page_size,
        max_rows=options.branches + 1,
        max_step_tokens=options.prefix,
        overlap=True,
    )
    script = Script(block_script(options.branches, options.path_tokens))
    engine = Engine(NoModel(VOCAB_SIZE), VOCAB, config, sampler=script)
    engine.runner.graphs = HostGraphs(options.page_size)  # type: ignore[assignment]
    return engine


def measure(options: Options, profile: cProfile.Profile | None = None) -> dict[str, dict[str, float]]:
    """Of `fork` and `join`: median milliseconds of each part of the turn, as `Turn.figures` names them, and of all of
    them; without `copy_ms` and `launch_ms`, in which a CPU does what is a GPU's."""
    engine = make_engine(options)
    sampling = SamplingParams(max_tokens=(options.branches + 1) * (options.path_tokens + 256))
    request = Request(prompt_ids=[TEXT] * options.prefix, sampling=sampling)
    engine.generate([request])  # the prefix cache has it now
    with TurnWatch(engine) as watch:
        if profile is not None:
            profile_turns(engine, profile)
        for _ in range(options.answers):
            engine.generate([request])
    found: dict[str, dict[str, float]] = {}
    for kind in ("fork", "join"):
        turns = [turn.figures() for turn in watch.turns if turn.kind == kind]
        assert len(turns) == options.answers, "the script did not play as written"
        parts = {part: [turn[part] for turn in turns] for part in ("commit_ms", "plan_ms", "prepare_ms")}
        sums = [sum(times) for times in zip(*parts.values(), strict=True)]
        found[kind] = {part: statistics.median(times) for part, times in (parts | {"turn_ms": sums}).items()}
    return found


def profile_turns(engine: Engine, profile: cProfile.Profile) -> None:
    """Profile from the arrival of tokens that turn a block until the step after them is prepared."""
    parts: Any = engine
    came, prepare = parts._turns.came, parts.runner.graphs.prepare

    def watched_came(*args: Any) -> bool:
        turned: bool = came(*args)
        if turned:
            profile.enable()
        return turned

    def watched_prepare(*args: Any) -> None:
        prepare(*args)
        profile.disable()

    parts._turns.came, parts.runner.graphs.prepare = watched_came, watched_prepare


def main() -> None:
    options = parse_options(Options)
    torch.set_num_threads(1)
    profile = cProfile.Profile() if options.profile else None
    for kind, figures in measure(options, profile).items():
        print(f"{kind} of {options.branches}:", ", ".join(f"{part[:-3]} {ms:.3f} ms" for part, ms in figures.items()))
    for rows, ms in measure_lists(options).items():
        print(f"list of work of {rows} rows: {ms:.3f} ms")
    if profile is not None:
        pstats.Stats(profile).sort_stats("tottime").print_stats(40)


if __name__ == "__main__":
    run_tool(main)
