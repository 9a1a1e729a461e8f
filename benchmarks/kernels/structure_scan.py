"""The scan beside FlexAttention's create_block_mask, which makes the tile lists alone, on one GPU, in one run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from benchmarks.kernels.attention_rivals import block_mask_maker
from benchmarks.kernels.cases import CASES, TAG_IDS, make_ids
from benchmarks.kernels.record import Recorder
from benchmarks.kernels.timing import Step, in_turns
from megatron_multiverse.cli import parse_options, run_tool
from megatron_multiverse.kernels.structure_scan import StructureScan, structure_scan, structure_scan_reference

NOTE = (
    "Microseconds, medians. scan: token ids to positions, labels and tile lists of queries and keys; "
    "graph: by replay of a CUDA graph that holds one call, in_graph: a tenth of one that holds ten, else called from "
    "Python. block_mask: create_block_mask, labels (which it cannot make) to tile lists: eager, compiled, and the "
    "device time of the compiled one's kernels alone; times_faster: those two over scan_graph. A row counts only if "
    "the scan equals the reference and the block mask has the same tiles."
)


@dataclass
class Options:
    """What to measure."""

    lengths: list[int] = field(default_factory=lambda: [32768, 131072])
    """Tokens."""
    rival_length: int = 32768
    """The length at which create_block_mask runs, too. It evaluates every pair of tokens, so longer takes long."""
    output: str | None = None
    """Folder; default benchmarks/kernels/results."""
    commit: str | None = None
    """Commit to record; default that of the working tree."""


class Case:
    """A case of one length, with the result that is right for it."""

    def __init__(self, name: str, tokens: int) -> None:
        self.name, self.tokens = name, tokens
        ids, documents = make_ids(name, tokens)
        tags = torch.tensor(TAG_IDS)
        self.num_tags = int(torch.isin(ids, tags).sum())
        self.want = structure_scan_reference(ids, documents, tags)
        self.given = ids.cuda(), documents.cuda(), tags.cuda()


class BlockMaskRival:
    """create_block_mask from the labels that the scan made. Compiled once, since labels are copied in place."""

    def __init__(self, tokens: int) -> None:
        self.r = torch.zeros(1, tokens, dtype=torch.int32, device="cuda")
        self.compiled, self.eager = (block_mask_maker(self.r, compiled=compiled) for compiled in (True, False))

    def fits(self, scan: StructureScan) -> bool:
        """Take the labels of a scan, and say whether both visit the same tiles."""
        self.r.copy_(scan.r)
        mask = self.compiled()
        tiles = scan.lists.q_partial.counts + scan.lists.q_full.counts
        return mask.full_kv_num_blocks is not None and torch.equal(mask.kv_num_blocks + mask.full_kv_num_blocks, tiles)


def device_time(function: Callable[[], Any], *, calls: int = 5) -> float:
    """Microseconds that the kernels of one call run, without the gaps between them."""
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as run:
        for _ in range(calls):
            function()
        torch.cuda.synchronize()
    return float(sum(event.self_device_time_total for event in run.key_averages())) / calls


def graph_of(function: Callable[[], Any], calls: int = 1) -> torch.cuda.CUDAGraph:
    """A CUDA graph of some calls."""
    function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            function()
    return graph


def measure(case: Case, rival: BlockMaskRival | None) -> dict[str, Any] | None:
    """One row; None if a result is wrong."""
    call = partial(structure_scan, *case.given)
    scan = call()
    if difference := scan.difference(case.want):
        print(f"NOT COUNTED: {case.name} at {case.tokens}: {difference} differs from the reference", flush=True)
        return None
    one, ten = graph_of(call), graph_of(call, 10)
    steps = {
        "scan_graph_us": Step.of(one.replay, calls=20),
        "scan_in_graph_us": Step.of(ten.replay, calls=4),
        "scan_us": Step.of(call, calls=20),
    }
    if rival is not None and not rival.fits(scan):
        print(f"NOT COUNTED: create_block_mask of {case.name} at {case.tokens} has other tiles", flush=True)
        rival = None
    if rival is not None:
        compiled, eager = rival.compiled, rival.eager
        steps["block_mask_compiled_us"] = Step.of(compiled, calls=4)
        steps["block_mask_us"] = Step.of(eager)
    row: dict[str, Any] = {"layout": case.name, "tokens": case.tokens, "tags": case.num_tags}
    row |= {name: 1e3 * time for name, time in in_turns(steps, 3).items()}
    row["scan_in_graph_us"] /= 10
    if rival is not None:
        row["block_mask_kernels_us"] = device_time(rival.compiled)
        for name in ("compiled", "kernels"):
            row[f"times_faster_{name}"] = row[f"block_mask_{name}_us"] / row["scan_graph_us"]
    return row


def main() -> None:
    """Run all cases."""
    o = parse_options(Options)
    recorder = Recorder("structure_scan", o.output, o.commit, key=("layout", "tokens"))
    rival = BlockMaskRival(o.rival_length)
    for tokens in o.lengths:
        for name in CASES:
            row = measure(Case(name, tokens), rival if tokens == o.rival_length else None)
            if row is not None:
                recorder.add(**row)
    recorder.table(NOTE)


if __name__ == "__main__":
    run_tool(main)
