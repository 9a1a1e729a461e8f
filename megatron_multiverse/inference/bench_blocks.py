"""What parallel blocks save and cost, over fixed work: the parts speedup and joint of tools/bench_engine.py."""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from megatron_multiverse.config import SamplingParams
from megatron_multiverse.inference.bench_script import (
    CONCLUSION,
    TEXT,
    Script,
    alike_tokens,
    block_header,
    block_script,
)
from megatron_multiverse.inference.bench_turns import TurnWatch
from megatron_multiverse.inference.engine import Engine
from megatron_multiverse.inference.text.request import Request
from megatron_multiverse.inference.text.result import Result

NEAR, AROUND = 6, 30
"""Steps before and after a fork or join: those that it may make longer, and those that they are compared with."""
LABEL = 8
"""More than the forced tokens that a path or a conclusion begins with."""


class BlockWork(NamedTuple):
    """An answer of one block and text after it; without branches it is text alone."""

    branches: int
    path_tokens: int
    text_tokens: int

    @property
    def header(self) -> list[int]:
        """What the answer begins with: given, not decoded."""
        return block_header(self.branches) if self.branches else []


def work_for(num_parallel: float, tokens: int) -> BlockWork:
    """About `tokens` tokens, of which the longest chain has one in `num_parallel`: few paths, as models write them."""
    if num_parallel == 1:
        return BlockWork(0, 0, tokens)
    branches = math.ceil(num_parallel) + 1
    path = max(2, round(tokens * (1 - 1 / num_parallel) / (branches - 1)))
    return BlockWork(branches, path, max(1, tokens - branches * path))


def silence_tags(model: nn.Module) -> None:
    """Random weights must draw no tag, or the work would not be fixed: their logits become 0, far from the largest."""
    weights = dict(model.named_parameters())
    with torch.no_grad():
        weights.get("output_layer.weight", weights["embedding.word_embeddings.weight"])[:TEXT] = 0


def block_request(prompt: Sequence[int], work: BlockWork, *, at_once: bool) -> Request:
    """An answer that begins with a block's header, so that it forks whatever the weights are."""
    header = work.header
    sampling = SamplingParams(
        max_tokens=len(header) + work.branches * (work.path_tokens + LABEL) + work.text_tokens,
        branch_max_tokens=work.path_tokens or None,
        max_concurrent_branches=None if at_once else 1,
        ignore_eos=True,
    )
    return Request(prompt_ids=prompt, sampling=sampling, answer_start=header)


def seconds_for(engine: Engine, requests: Sequence[Request]) -> tuple[float, list[Result]]:
    """Serve requests that come at once."""
    start = time.perf_counter()
    results = engine.generate(requests)
    return time.perf_counter() - start, results


def speedup(
    engine: Engine, prompts: Sequence[Sequence[int]], num_parallel: float, tokens: int, repeats: int
) -> dict[str, Any]:
    """A row: answers that fork, beside the same answers with one path after the other.

    The prompts must be in the prefix cache already. All of an answer runs once before it counts, so that nothing is
    compiled and no graph is captured in between.
    """
    work = work_for(num_parallel, tokens)
    times: dict[bool, list[float]] = {}
    for at_once in (True, False) if work.branches else (True,):
        requests = [block_request(prompt, work, at_once=at_once) for prompt in prompts]
        seconds_for(engine, requests)
        times[at_once] = []
        for _ in range(repeats):
            seconds, results = seconds_for(engine, requests)
            times[at_once].append(seconds)
    own, serial = (statistics.median(times.get(at_once, times[True])) for at_once in (True, False))
    written = statistics.mean(len(result.token_ids) for result in results) - len(work.header)
    parallel = written / (statistics.mean(result.critical_tokens for result in results) - len(work.header))
    return {
        "case": f"speedup, batch {len(prompts)}, num_parallel {num_parallel:g}",
        "batch": len(prompts),
        "num_parallel": parallel,
        "branches": work.branches,
        "tokens": written,
        "seconds": own,
        "serial_seconds": serial,
        "runs_s": times[True],
        "serial_runs_s": times.get(False, times[True]),
        "ms_per_token": own / written * 1e3,
        "speedup": serial / own,
        "speedup_per_parallel": serial / own / parallel,
    }


def fit_law(rows: Sequence[dict[str, Any]]) -> tuple[float, float]:
    """a and b of a / x + b, the milliseconds per token of an answer with num_parallel x (paper, Fig. 8a)."""
    x = np.array([1 / row["num_parallel"] for row in rows])
    y = np.array([row["ms_per_token"] for row in rows])
    (a, b), *_ = np.linalg.lstsq(np.stack((x, np.ones_like(x)), 1), y, rcond=None)
    return float(a), float(b)


def joint(engine: Engine, prompt: Sequence[int], branches: int, tokens: int) -> dict[str, Any]:
    """A row: what fork and join of a block take beyond the steps in which its tokens are drawn.

    A script draws the whole answer, header included. Each token of the longest chain needs a step; steps beyond that,
    and what the steps near fork and join take longer than their neighbours, are due to fork and join. `turns` says
    where their time goes on the host, and on a GPU how long that has nothing to do, and how long it takes for them;
    `excess_ms` which of the steps near them take longer, in their order.
    """
    script = block_script(branches, tokens)
    engine.runner.sampler = Script(script)
    most = branches * (tokens + LABEL) + len(block_header(branches)) + CONCLUSION + 16
    request = Request(prompt_ids=prompt, sampling=SamplingParams(max_tokens=most))
    for _ in range(2):  # compiles, captures, and fills the prefix cache
        engine.generate([request])
    fed, copied = engine.fed_tokens, engine.copied_tokens
    engine.add_request(request)
    times: list[float] = []
    inside: list[bool] = []
    done: list[Result] = []
    ahead = int(engine.overlap)  # the last step is launched before the end is known; it feeds one token
    steps = -ahead
    with TurnWatch(engine) as watch:
        while not done:
            steps += 1
            live, begun = len(engine.scheduler.places.nodes), _has_begun(engine)
            start = time.perf_counter()
            done = engine.step()
            if begun:
                times.append(time.perf_counter() - start)
                inside.append(live > branches)
    (result,) = done
    root, *paths = (len(ids) for ids in script.values())
    step = statistics.median(itertools.compress(times, inside))
    more_steps = steps - root - max(paths)
    near = excess(times, inside)
    extra = more_steps * step + sum(map(sum, near))
    needed = len(result.prompt_ids) - result.cached_tokens + len(result.token_ids) - alike_tokens(branches)
    return {
        "case": f"fork and join of {branches}, {'overlapped' if engine.overlap else 'in turn'}",
        "overlap": engine.overlap,
        "branches": branches,
        "path_tokens": tokens,
        "prefix": len(prompt),
        "fork_and_join_ms": extra * 1e3,
        "ms_per_step": step * 1e3,
        "in_steps": extra / step,
        "more_steps": more_steps,
        "copied_tokens": engine.copied_tokens - copied,
        "most_copied_tokens": (3 * branches + 2) * engine.config.page_size,
        "fed_again_tokens": engine.fed_tokens - fed - needed - ahead,
        "turns": {turn.kind: turn.figures() for turn in watch.turns},
        "excess_ms": dict(zip(("fork", "join"), ([1e3 * seconds for seconds in steps] for steps in near), strict=True)),
    }


def excess(times: Sequence[float], inside: Sequence[bool]) -> list[list[float]]:
    """Seconds that each of the steps near a change of `inside` takes longer than the median of its kind around it; a
    list for each change, from `NEAR` steps before it to `NEAR` after it."""
    found = []
    for change in (k for k in range(1, len(inside)) if inside[k] != inside[k - 1]):
        around = range(max(change - AROUND, 0), min(change + AROUND, len(times)))
        usual = {kind: statistics.median(times[k] for k in around if inside[k] == kind) for kind in (True, False)}
        near = range(max(change - NEAR, 0), min(change + NEAR, len(times)))
        found.append([times[k] - usual[inside[k]] for k in near])
    return found


def _has_begun(engine: Engine) -> bool:
    return any(len(state.root.ids) > state.root.prompt_length for state in engine.scheduler.active)
