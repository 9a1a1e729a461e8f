"""Attention of a decode step whose rows share a prefix, on one GPU: the prefix read once by as many rows as fill a
tile, as the engine does, beside plain paged decoding of the same rows by the same kernel.

Every row also has tokens of its own. In further cases several requests have paths of their own, which share the prompt
of their request alone. Calls are replayed as a CUDA graph, as in a decode step. The caches of several layers take
turns, so that none is left in the L2 cache from the call before. What counts as moved are the keys and values of the
prefix, once, and those of the rows.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from benchmarks.kernels.record import Recorder
from benchmarks.kernels.timing import Step, captured, in_turns
from megatron_multiverse.cli import parse_options, run_tool
from megatron_multiverse.kernels.device import processors
from megatron_multiverse.kernels.tree_decode import (
    DeviceWork,
    Work,
    divide_work,
    most_parts,
    most_sharers,
    tree_decode_reference,
)

L2_BYTES = 200 << 20
"""More than any L2 cache has."""
CALLS = 20
"""Calls of a graph."""
TOLERANCE = 6e-3
"""Relative error in bfloat16 against float64."""


class Case(NamedTuple):
    """Rows of a step."""

    requests: int
    paths: int
    """Of each request."""
    prefix: int
    """Tokens that the paths of a request share."""
    own: int
    """Tokens of each path alone."""


@dataclass
class Options:
    """What to measure."""

    rows: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    """Branches."""
    prefixes: tuple[int, ...] = (0, 512, 1024, 2048, 8192, 32768)
    """Tokens that all of them share."""
    longest: tuple[int, int] | None = (8, 65536)
    """Rows and prefix of one more case."""
    blocks: tuple[tuple[int, int], ...] = ((8, 3), (10, 3), (8, 5), (32, 3), (32, 5), (24, 1), (32, 1), (40, 1))
    """(requests, paths of each), each request after 1,024 tokens of its own."""
    blocks_own: tuple[int, ...] = (16, 128)
    """Tokens of each path alone, in those cases."""
    own: int = 256
    """Tokens of each branch alone."""
    heads: int = 28
    kv_heads: int = 4
    dim: int = 128
    page_size: int = 16
    rounds: int = 2
    """Turns of each way; the median of all replays counts."""
    output: str | None = None
    """Folder; default benchmarks/kernels/results."""
    commit: str | None = None
    """Commit to record; default that of the working tree."""


def main() -> None:
    """Run all cases."""
    o = parse_options(Options)
    key = ("rows", "prefix", "own", "heads", "kv_heads", "requests")
    recorder = Recorder("tree_decode", o.output, o.commit, key=key)
    read = read_rate()
    cases = [(rows, prefix) for prefix in o.prefixes for rows in o.rows]
    for rows, prefix in [*cases, *([o.longest] if o.longest else [])]:
        measure(recorder, o, Case(1, rows, prefix, o.own), read)
    for own, (requests, paths) in itertools.product(o.blocks_own, o.blocks):
        measure(recorder, o, Case(requests, paths, 1024, own), read)
    recorder.table(
        "Microseconds of one layer: `shared_us` by a list of work that reads a shared prefix once for as many rows as "
        "fill a tile, `plain_us` by a list in which each row reads all its pages, `engine_us` by the one that the "
        "engine takes; `requests`: how many have a prefix and their part of the rows each, one where it is left out. "
        "`share`: of the rate at which this GPU reads a large tensor, with shared prefixes counted once."
    )


def measure(recorder: Recorder, o: Options, case: Case, read: float) -> None:
    """Check one case against float64, time all ways in turns, and record it."""
    pages, lengths, num_pages = tables(case, o.page_size)
    rows = len(lengths)
    borders = np.arange(rows + 1, dtype=np.int64)
    there, sharers = processors(torch.device("cuda")), most_sharers(o.heads, o.kv_heads)
    divide = partial(
        divide_work, pages, lengths, borders, page_size=o.page_size, kv_heads=o.kv_heads, processors=there,
        slots=most_parts(rows), sharers=sharers,
    )  # fmt: skip
    works = {"shared": divide(least_shared=o.page_size), "plain": divide(least_shared=1 << 30)}
    size = 2 * num_pages * o.page_size * o.kv_heads * o.dim * 2
    layers = max(1, -(-L2_BYTES // size))
    cache = torch.randn(layers, 2, num_pages, o.page_size, o.kv_heads, o.dim, device="cuda", dtype=torch.bfloat16)
    query = torch.randn(rows, o.heads, o.dim, device="cuda", dtype=torch.bfloat16)
    calls = {name: attend(work, query, cache) for name, work in works.items()}
    errors = {name: error(call(0), query, cache[0], pages, lengths, borders) for name, call in calls.items()}
    if max(errors.values()) > TOLERANCE:
        raise SystemExit(f"{case}: wrong by {errors}")
    graphs = {
        name: captured([partial(call, number % layers) for number in range(CALLS)]) for name, call in calls.items()
    }
    replays = in_turns({name: Step.of(graph.replay) for name, graph in graphs.items()}, o.rounds)
    times = {name: time / CALLS for name, time in replays.items()}
    way = "shared" if divide().tokens.shape[1] > 1 else "plain"
    row: dict[str, Any] = {"rows": rows, "prefix": case.prefix, "own": case.own}
    row |= {"heads": o.heads, "kv_heads": o.kv_heads}
    if case.requests > 1:
        row["requests"] = case.requests
    row |= {f"{name}_us": 1e3 * time for name, time in times.items()}
    row |= {"engine": way, "engine_us": 1e3 * times[way], "engine_over_plain": times[way] / times["plain"]}
    moved = 2 * o.kv_heads * o.dim * 2 * (case.requests * case.prefix + rows * case.own)
    recorder.add(**row, moved_mb=moved / 1e6, share=moved / times[way] / 1e-3 / read, error=max(errors.values()))


def tables(case: Case, page_size: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32], int]:
    """Page table [rows, p], lengths [rows] and pages in all, which lie in the cache in random order."""
    rows, shared, each = case.requests * case.paths, case.prefix // page_size, case.own // page_size
    common = case.requests * shared
    order = np.random.default_rng(0).permutation(common + rows * each).astype(np.int32)
    pages = np.empty((rows, shared + each), dtype=np.int32)
    pages[:, :shared] = order[:common].reshape(case.requests, shared).repeat(case.paths, axis=0)
    pages[:, shared:] = order[common:].reshape(rows, each)
    return pages, np.full(rows, case.prefix + case.own, dtype=np.int32), len(order)


def attend(work: Work, query: Tensor, cache: Tensor) -> Any:
    """A call of a layer's number."""
    there = DeviceWork.upload(work, query.device)
    return lambda layer: there(query, cache[layer, 0], cache[layer, 1], query.shape[-1] ** -0.5)


def error(
    got: Tensor,
    query: Tensor,
    cache: Tensor,
    pages: npt.NDArray[np.int32],
    lengths: npt.NDArray[np.int32],
    borders: npt.NDArray[np.int64],
) -> float:
    """Relative, against float64; two rows are enough where there are many."""
    rows = sorted({0, len(lengths) - 1})
    picked = [torch.from_numpy(x).cuda() for x in (pages[rows], lengths[rows], borders[: len(rows) + 1])]
    want = tree_decode_reference(query[rows].double(), *cache.double(), *picked, query.shape[-1] ** -0.5)
    return float((got[rows].double() - want).norm() / want.norm())


def read_rate() -> float:
    """Bytes per second at which a large tensor is read and summed up."""
    source = torch.ones(1 << 30, device="cuda", dtype=torch.bfloat16)
    return source.nbytes / in_turns({"read": Step.of(source.sum, calls=4)}, 3)["read"] / 1e-3


if __name__ == "__main__":
    run_tool(main)
