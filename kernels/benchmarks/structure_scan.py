"""The scan beside FlexAttention's create_block_mask, which makes part of what it makes, on one GPU, in one run."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megatron_multiverse.cli import parse_options
from megatron_multiverse.kernels.benchmarks.record import Recorder
from megatron_multiverse.kernels.benchmarks.tagged import TAG_IDS, TAGGED, make_ids
from megatron_multiverse.kernels.structure_scan import StructureScan, structure_scan, structure_scan_reference

NOTE = (
    "scan: token ids to positions, labels, segment ends, tile lists for queries and keys, and tile order. "
    "create_block_mask: labels (which it cannot make) to tile lists. *_graph_us by CUDA graph replay, *_us called "
    "from Python; microseconds, medians. A row counts only if the scan equals the reference and the block mask's "
    "tiles are those of the scan."
)


@dataclass
class Options:
    """What to measure."""

    tokens: str = "32768,131072"
    """Lengths, separated by commas."""
    rival_tokens: int = 32768
    """The length at which create_block_mask runs too; it evaluates every pair."""
    output: str | None = None
    """Folder; default kernels/benchmarks/results."""
    commit: str | None = None
    """Commit to record; default that of the working tree."""


def timed(function: Callable[[], Any], *, repeats: int = 15, calls: int = 20) -> float:
    """Median microseconds of one call, over `repeats` groups of `calls`."""
    function()
    groups = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(calls):
            function()
        end.record()
        end.synchronize()
        groups.append(1e3 * begin.elapsed_time(end) / calls)
    return statistics.median(groups)


def graph_of(function: Callable[[], Any]) -> torch.cuda.CUDAGraph:
    """One call, captured."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph


def is_right(scan: StructureScan, ids: Tensor, documents: Tensor) -> bool:
    """Whether every field equals the reference."""
    want = structure_scan_reference(ids, documents, torch.tensor(TAG_IDS))
    same = all(
        torch.equal(getattr(scan, name).cpu(), getattr(want, name))
        for name in ("malformed", "position_ids", "r", "segment_end", "work_order")
    )
    for name in ("q_partial", "q_full", "k_partial", "k_full"):
        got, right = getattr(scan.lists, name), getattr(want.lists, name)
        valid = torch.arange(right.indices.shape[-1]) < right.counts[..., None]
        same &= torch.equal(got.counts.cpu(), right.counts)
        same &= torch.equal(got.indices.cpu()[valid], right.indices[valid])
    return same and not bool(want.malformed.any())


class BlockMaskRival:
    """create_block_mask for the same mask, from the labels the scan made. Compiled once: the labels lie in place."""

    def __init__(self, tokens: int) -> None:
        from torch.nn.attention import flex_attention

        self.tokens = tokens
        self.r = torch.zeros(tokens, dtype=torch.int32, device="cuda")
        self.make = flex_attention.create_block_mask
        self.compiled = torch.compile(self.make)

    def visible(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        """mask_mod of FlexAttention."""
        return (k <= q) & (self.r[k] <= self.r[q])

    def measure(self, scan: StructureScan) -> dict[str, float]:
        """Times of the eager and compiled form; nothing if its tiles are not those of the scan."""
        self.r.copy_(scan.r[0])

        def call(make: Any) -> Any:
            return make(self.visible, None, None, self.tokens, self.tokens, device="cuda")

        mask = call(self.compiled)
        both = mask.kv_num_blocks + mask.full_kv_num_blocks
        if not torch.equal(both, scan.lists.q_partial.counts + scan.lists.q_full.counts):
            print("NOT COUNTED: create_block_mask has other tiles", flush=True)
            return {}
        times = {
            "create_block_mask_us": timed(lambda: call(self.make), repeats=5, calls=3),
            "compiled_us": timed(lambda: call(self.compiled), repeats=7),
        }
        try:
            times["compiled_graph_us"] = timed(graph_of(lambda: call(self.compiled)).replay, repeats=7)
        except RuntimeError as error:
            print(f"compiled create_block_mask cannot be captured: {str(error)[:200]}", flush=True)
            torch.cuda.synchronize()
        return times


def main() -> None:
    """Run all cases."""
    o = parse_options(Options)
    recorder, rival = Recorder("structure_scan", o.output, o.commit), BlockMaskRival(o.rival_tokens)
    tags = torch.tensor(TAG_IDS, device="cuda")
    for tokens in map(int, o.tokens.split(",")):
        for name in TAGGED:
            ids, documents = make_ids(name, tokens)
            on_gpu = ids.cuda(), documents.cuda(), tags
            scan = structure_scan(*on_gpu)
            if not is_right(scan, ids, documents):
                print(f"NOT COUNTED: {name} at {tokens} differs from the reference", flush=True)
                continue
            graph = graph_of(partial(structure_scan, *on_gpu))
            row: dict[str, Any] = {"layout": name, "tokens": tokens, "tags": int(torch.isin(ids, tags.cpu()).sum())}
            row["scan_graph_us"] = timed(graph.replay)
            row["scan_us"] = timed(partial(structure_scan, *on_gpu))
            if tokens == o.rival_tokens:
                times = rival.measure(scan)
                row |= times
                if times:
                    fastest = min(times.get("compiled_graph_us", times["compiled_us"]), times["compiled_us"])
                    row["compiled_over_scan"] = fastest / row["scan_graph_us"]
            recorder.add(**row)
    recorder.table(NOTE)


if __name__ == "__main__":
    main()
