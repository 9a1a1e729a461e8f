"""How evenly context parallel ranks share attention under the Multiverse mask: our split beside zig-zag.

A step waits for the slowest rank, so what counts is the largest share divided by the mean one. Shares are counted in
visible (query, key) pairs, which needs no GPU. On a GPU each rank's share of the attention, its queries over the keys
of the whole row, is also timed, one rank after the other, forward and backward.

    python -m benchmarks.training_balance
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.kernels.cases import CASES, make_r
from benchmarks.kernels.record import Recorder
from benchmarks.kernels.timing import Step, in_turns
from benchmarks.training_layouts import RESULTS
from megatron_multiverse.cli import parse_options, run_tool
from megatron_multiverse.errors import ConfigError
from megatron_multiverse.kernels.multiverse_attention import AttentionLayout, multiverse_attention
from megatron_multiverse.model.context_parallel import split_by_area
from megatron_multiverse.model.device import choose_device

CPU_RESULTS = "training_balance_cpu.json"


@dataclass
class Options:
    """What to share out."""

    cases: list[str] = field(default_factory=lambda: ["packed", "realistic", "wide", "deep", "causal"])
    """Names in benchmarks/kernels/cases.py."""
    ranks: list[int] = field(default_factory=lambda: [2, 4, 8])
    """Context parallel sizes."""
    tokens: int = 65536
    """Tokens of the row."""
    heads: int = 28
    """Query heads; the defaults are those of Qwen2.5-7B."""
    groups: int = 4
    """Key/value heads."""
    dim: int = 128
    """Width of a head."""
    output: str | None = None
    """Folder of the results; default benchmarks/results."""
    commit: str | None = None
    """Commit to record; default that of the working tree."""

    def __post_init__(self) -> None:
        if unknown := [name for name in self.cases if name not in CASES]:
            raise ConfigError(f"cases {unknown} unknown, allowed: {', '.join(CASES)}")
        if misfits := [ranks for ranks in self.ranks if ranks < 1 or self.tokens % (2 * ranks)]:
            raise ConfigError(f"tokens ({self.tokens}) must be a multiple of twice each of ranks, got {misfits}")


def zig_zag(r: Tensor, ranks: int) -> Tensor:
    """Two stretches of each row for each rank, one from the front and one from the back: even under a causal mask.

    Args:
        r: labels [b, s].
        ranks: c.

    Returns:
        int64 [b, c, s / c], as `split_by_area` gives them.
    """
    parts = torch.arange(r.shape[1]).view(2 * ranks, -1)
    places = torch.stack([torch.cat([parts[k], parts[2 * ranks - 1 - k]]) for k in range(ranks)])
    return places.expand(len(r), -1, -1)


SPLITS: dict[str, Callable[[Tensor, int], Tensor]] = {"by visible area": split_by_area, "zig-zag": zig_zag}


def visible_keys(r: Tensor, *, chunk: int = 1024) -> Tensor:
    """How many keys each token of r [1, s] sees: int64 [s].

    For a chunk of tokens the keys before it are counted in their sorted labels, those inside it one by one.
    """
    counts = []
    for start in range(0, r.shape[1], chunk):
        own = r[0, start : start + chunk].contiguous()
        before = torch.searchsorted(r[0, :start].sort().values, own, right=True)
        counts.append(before + (own[:, None] >= own).tril().sum(1))
    return torch.cat(counts)


def over_mean(shares: list[float]) -> float:
    """The largest share divided by the mean one: 1.0 is even."""
    return max(shares) / statistics.mean(shares)


def shared_areas(seen: Tensor, places: Tensor) -> list[float]:
    """Visible pairs of each rank, for `visible_keys` [s] and places [1, c, s / c]."""
    return [float(seen[own].sum()) for own in places[0]]


def rank_layout(r: Tensor, places: Tensor, rank: int) -> AttentionLayout:
    """The queries of one rank over the keys of all, in the order in which they are gathered; see `share_tokens`."""
    everyone = places.to(r.device)
    mine, keys = everyone[:, rank], everyone.flatten(1)
    return AttentionLayout(r.gather(1, mine), mine.int(), r.gather(1, keys), keys.int())


def rank_times(o: Options, r: Tensor, places: Tensor) -> list[float]:
    """Milliseconds of each rank's attention, forward and backward, the tile lists made before."""
    steps = {}
    for rank in range(places.shape[1]):
        layout = rank_layout(r, places, rank)
        steps[str(rank)] = Step.of(attention_step(o, layout))
    times = in_turns(steps, 2)
    return [times[str(rank)] for rank in range(places.shape[1])]


def attention_step(o: Options, layout: AttentionLayout) -> Callable[[], Any]:
    """Attention forward and backward on random tensors in bfloat16, in megatron-core's memory order."""
    _, queries, keys = layout.shape

    def draw(tokens: int, heads: int) -> Tensor:
        x = torch.randn(tokens, 1, heads, o.dim, device="cuda", dtype=torch.bfloat16)
        return x.permute(1, 2, 0, 3).requires_grad_()

    q, k, v = draw(queries, o.heads), draw(keys, o.groups), draw(keys, o.groups)
    upstream = draw(queries, o.heads).detach()
    return lambda: torch.autograd.grad(multiverse_attention(q, k, v, layout), (q, k, v), upstream)


def rows_of(o: Options, case: str) -> Iterator[dict[str, Any]]:
    """Both splits of one case over every number of ranks, each as soon as it is known."""
    r = make_r(case, o.tokens)
    seen = visible_keys(r.to(choose_device("auto"))).cpu()
    for ranks in o.ranks:
        for name, split in SPLITS.items():
            places = split(r, ranks)
            row: dict[str, Any] = {"case": case, "tokens": o.tokens, "ranks": ranks, "split": name}
            row["area_over_mean"] = round(over_mean(shared_areas(seen, places)), 4)
            if torch.cuda.is_available():
                times = rank_times(o, r.cuda(), places)
                row |= {"time_over_mean": over_mean(times), "slowest_ms": max(times), "mean_ms": statistics.mean(times)}
                row["rank_ms"] = [round(time, 3) for time in times]
            yield row


def main() -> None:
    """Share every case out, and time the shares where there is a GPU."""
    o = parse_options(Options)
    folder = Path(o.output or RESULTS)
    if not torch.cuda.is_available():
        rows = [row for case in o.cases for row in rows_of(o, case)]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CPU_RESULTS).write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n", encoding="utf-8")
        print(*rows, f"wrote {folder / CPU_RESULTS}; there is no GPU to time the shares on", sep="\n")
        return
    command = "python -m benchmarks.training_balance"
    recorder = Recorder(
        "training_balance", str(folder), o.commit, key=("case", "tokens", "ranks", "split"), command=command
    )
    for case in o.cases:
        for row in rows_of(o, case):
            recorder.add(**row)
    recorder.table(
        f"Attention of one row shared out to context parallel ranks, {o.heads} query heads, {o.groups} key/value "
        f"heads, width {o.dim}, bfloat16, forward and backward: the largest rank's visible pairs and time, each over "
        "the mean of the ranks. Each rank's share was timed by itself, on one GPU, without the gathering of keys and "
        "values."
    )


if __name__ == "__main__":
    run_tool(main)
