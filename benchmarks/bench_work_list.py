"""Host time of attention's list of work over steps in which each row only has a token more.

    python -m benchmarks.bench_work_list

Rows are the paths of blocks, each after a prompt that the paths of one request share, and with some tokens of its own;
one path is text. Prints, for each case, milliseconds per step (each step's smallest of several times, on average), how
many lists are made anew instead of moved on, and what a GPU has to do for the lists: items, and keys of all of them.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from benchmarks.bench_host_step import HEADS, KV_HEADS, PROCESSORS
from megatron_multiverse.cli import parse_options, run_tool
from megatron_multiverse.kernels.tree_decode import SuccessiveWork, Work, most_parts, most_sharers


@dataclass(frozen=True, kw_only=True)
class Options:
    """The steps."""

    rows: tuple[int, ...] = (8, 32, 96, 160)
    """Rows of a step, or as many as whole requests make of them."""
    paths: tuple[int, ...] = (1, 3, 5, 8)
    """Rows of each request."""
    prefixes: tuple[int, ...] = (1024, 4096)
    """Tokens that the rows of a request share."""
    own: int = 500
    """Most tokens of each row alone in the first step; the fewest are 1."""
    steps: int = 64
    """Steps one after the other."""
    seeds: int = 6
    """How often, with other tokens of rows alone."""
    repeats: int = 4
    """How often each of them is timed."""
    page_size: int = 16
    """Tokens per page."""
    output: Path | None = None
    """JSON file for the figures."""


class Step(NamedTuple):
    """What a list is made for; see `divide_work`."""

    pages: npt.NDArray[np.int32]
    lengths: npt.NDArray[np.int32]
    borders: npt.NDArray[np.int64]


def successive_steps(options: Options, requests: int, paths: int, prefix: int, seed: int) -> list[Step]:
    """Steps of rows whose pages lie in random order; a row lists the pages that it needs, and then one of nobody."""
    rng = np.random.default_rng(seed)
    rows, shared = requests * paths, prefix // options.page_size
    width = shared + -(-(options.own + options.steps) // options.page_size)
    order = rng.permutation(requests * shared + rows * (width - shared)).astype(np.int32)
    table = np.empty((rows, width), dtype=np.int32)
    table[:, :shared] = order[: requests * shared].reshape(requests, shared).repeat(paths, 0)
    table[:, shared:] = order[requests * shared :].reshape(rows, -1)
    first = (prefix + rng.integers(1, options.own + 1, rows)).astype(np.int32)
    steps = []
    for number in range(options.steps):
        lengths = first + np.int32(number)
        used = -(-lengths // options.page_size)
        column = np.arange(used.max())
        pages = np.where(column < used[:, None], table[:, : len(column)], np.int32(len(order)))
        steps.append(Step(pages, lengths, np.arange(rows + 1)))
    return steps


def divide(options: Options, steps: Sequence[Step]) -> tuple[list[Work], list[float]]:
    """The lists of successive steps, and the seconds that each took."""
    sharers = most_sharers(HEADS, KV_HEADS)
    divider = SuccessiveWork(page_size=options.page_size, kv_heads=KV_HEADS, processors=PROCESSORS, sharers=sharers)
    works, times = [], []
    for step in steps:
        start = time.perf_counter()
        works.append(divider.divide(*step, most_parts(len(step.lengths))))
        times.append(time.perf_counter() - start)
    return works, times


def measure_case(options: Options, requests: int, paths: int, prefix: int) -> dict[str, float]:
    """One case's figures, on average over its steps but for `longest_ms`."""
    times: list[float] = []
    works: list[Work] = []
    made = 0
    for seed in range(options.seeds):
        steps = successive_steps(options, requests, paths, prefix, seed)
        runs = [divide(options, steps) for _ in range(options.repeats)]
        times += np.min([seconds for _, seconds in runs], axis=0).tolist()
        lists = runs[0][0]
        # A list that is moved on keeps the array of its queries.
        made += 1 + sum(work.tokens is not before.tokens for before, work in pairwise(lists))
        works += lists
    return {
        "rows": requests * paths,
        "paths": paths,
        "prefix": prefix,
        "ms": round(1e3 * float(np.mean(times)), 4),
        "longest_ms": round(1e3 * max(times), 4),
        "made_anew": round(made / len(works), 4),
        "items": round(float(np.mean([len(work.items) for work in works])), 2),
        "keys": round(float(np.mean([(work.items[:, 2] - work.items[:, 1]).sum() for work in works])), 1),
    }


def measure(options: Options) -> list[dict[str, float]]:
    """All cases."""
    return [
        measure_case(options, max(rows // paths, 1), paths, prefix)
        for prefix in options.prefixes
        for paths in options.paths
        for rows in options.rows
    ]


def main() -> None:
    options = parse_options(Options)
    cases = measure(options)
    for case in cases:
        print(
            f"{case['rows']} rows, {case['paths']} of each request after {case['prefix']} tokens: {case['ms']:.3f} ms, "
            f"{100 * case['made_anew']:.0f} % made anew, {case['items']:.1f} items of {case['keys']:.0f} keys"
        )
    if options.output is not None:
        options.output.write_text(json.dumps(cases, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run_tool(main)
