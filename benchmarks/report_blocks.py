"""Writes the table and the plot of what parallel blocks save and cost from the recorded figures.

    python -m benchmarks.report_blocks benchmarks/results/engine_blocks_h100.json

The file has `environment`, the rows that `tools/bench_engine.py --parts joint speedup` wrote, each with its commit, and
date and commands of the run at each commit (`runs`); .md and .png go beside it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from megatron_multiverse.cli import run_tool
from megatron_multiverse.config import ModelConfig
from megatron_multiverse.files import save_figure
from megatron_multiverse.inference.bench import BenchConfig, step_bytes
from megatron_multiverse.model.families import preset

PAPER_LAW = (15.43, 0.60)
"""Milliseconds per token of a / num_parallel + b at 8K tokens, 32B (arXiv 2506.09991, Fig. 8a; GPU not stated)."""
PAPER_SPEEDUPS = {
    1.1: (1.07, 1.13, 1.06, 1.08, 1.08, 1.15),
    1.2: (1.20, 1.18, 1.18, 1.18, 1.19, 1.22),
    1.3: (1.31, 1.25, 1.32, 1.31, 1.31, 1.35),
    1.5: (1.47, 1.46, 1.54, 1.52, 1.51, 1.55),
}
"""num_parallel -> speedups at batch 4 to 128, read off the paper's Fig. 8b."""
COLUMNS = (
    "Batch|num_parallel|Paths|Seconds|One by one|Speedup|Speedup / num_parallel|By step times|"
    "By bytes|ms per token|Commit"
)
TEXT = """# What parallel blocks save and cost, one {gpu}

{model}, bf16, random weights, prompts of {context} tokens that are in the prefix cache; {tokens} tokens an answer, of
which the longest chain has one in num_parallel. Beside each, the same answers with one path after the other. "By bytes"
is what Speedup / num_parallel would be if every step took the time of reading the weights once, and once each key and
value that its rows see: more rows would cost nothing but their own keys. "By step times" is what it would be if fork
and join took no time and a step of so many paths took as long as one of this engine with as many rows that share
nothing ({steps}; straight lines between them and beyond the last).
What is missing to 1 there is the price of more rows in a step; what is missing beyond it, forks, joins and all else.
Paths read the keys of their prompt once, so some are above it.

{columns}
|---|---|---|---|---|---|---|---|---|---|---|
{rows}

Milliseconds per token of an answer, fitted by a / num_parallel + b: {laws}.
The paper's 32B model: 15.43 / num_parallel + 0.60.

![law and speedups]({image})

Fork and join of a block of {branches} paths of {path_tokens} tokens after {prefix:,}, beyond the steps in which its
tokens are drawn. Steps count beyond one for each token of the longest chain; at most (3B + 2) P tokens are copied:

| | Fork and join, ms | In steps | More steps | Tokens copied (at most) | Tokens fed again | Commit |
|---|---|---|---|---|---|---|
{joints}

torch {torch}, Triton {triton}

{runs}
"""


def ideal_speedup(row: dict[str, Any], shape: ModelConfig, context: int) -> float:
    """Speedup over one path after the other of an engine whose steps take as long as what they must read.

    Args:
        row: what `bench_blocks.speedup` measured: batch, branches, tokens, num_parallel.
        shape: the model, in bf16.
        context: tokens of each prompt.
    """
    branches: int = row["branches"]
    if not branches:
        return 1.0
    chain = row["tokens"] / row["num_parallel"]  # a path and the text after the block
    path = round((row["tokens"] - chain) / (branches - 1))
    config = BenchConfig()

    def size(seen: Iterable[int]) -> int:
        """Bytes of steps in which the rows of each request see so many tokens, each counted once."""
        return sum(step_bytes(shape, config, row["batch"] * tokens) for tokens in seen)

    text = size(context + branches * path + k for k in range(round(chain) - path))
    at_once = size(context + branches * k for k in range(path))
    one_by_one = branches * size(context + k for k in range(path))
    return (one_by_one + text) / (at_once + text)


def decode_steps(model: str) -> dict[int, float]:
    """Milliseconds of a decode step by its rows, of requests that share nothing; empty if none are recorded."""
    found = json.loads((Path(__file__).parent / "results/engine_h200.json").read_text(encoding="utf-8"))
    return {row["batch"]: row["ms_per_step"] for row in found["decode"] if row["model"] == model}


def speedup_by_steps(row: dict[str, Any], steps: dict[int, float]) -> float:
    """Speedup over one path after the other if forks and joins took no time.

    Args:
        row: see `ideal_speedup`.
        steps: milliseconds of a step by its rows; in between and beyond, straight lines.
    """
    branches: int = row["branches"]
    if not branches:
        return 1.0
    chain = row["tokens"] / row["num_parallel"]
    path = round((row["tokens"] - chain) / (branches - 1))
    known = sorted(steps)

    def time(rows: int) -> float:
        """Of one step."""
        after = min((known.index(n) for n in known if n >= rows), default=len(known) - 1) or 1
        (a, b) = known[after - 1], known[after]
        return steps[a] + (steps[b] - steps[a]) * (rows - a) / (b - a)

    alone, together = time(row["batch"]), time(row["batch"] * branches)
    speedup: float = row["tokens"] * alone / (path * together + (chain - path) * alone)
    return speedup


def table_row(row: dict[str, Any], shape: ModelConfig, context: int, steps: dict[int, float]) -> str:
    """One line of the first table."""
    ideal = ideal_speedup(row, shape, context) / row["num_parallel"]
    by_steps = f"{speedup_by_steps(row, steps) / row['num_parallel']:.3f}" if steps else ""
    return (
        f"| {row['batch']} | {row['num_parallel']:.2f} | {row['branches'] or 'none'} | {row['seconds']:.3f} | "
        f"{row['serial_seconds']:.3f} | {row['speedup']:.2f} | {row['speedup_per_parallel']:.3f} | {by_steps} | "
        f"{ideal:.3f} | {row['ms_per_token']:.2f} | {row['commit']} |"
    )


def joint_row(row: dict[str, Any]) -> str:
    """One line of the second table."""
    runs = ", ".join(f"{run:.1f}" for run in row["runs_ms"])
    return (
        f"| {'overlapped' if row['overlap'] else 'in turn'}, {row['ms_per_step']:.2f} ms a step | "
        f"{row['fork_and_join_ms']:.1f} [{runs}] | {row['in_steps']:.2f} | {row['more_steps']} | "
        f"{row['copied_tokens']} ({row['most_copied_tokens']}) | {row['fed_again_tokens']} | {row['commit']} |"
    )


def draw(rows: list[dict[str, Any]], laws: dict[int, tuple[float, float]], path: Path) -> None:
    """The law of batch 1 beside the paper's, and the speedups of all batches beside the paper's."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np

    x = np.linspace(1, max(row["num_parallel"] for row in rows), 100)
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), constrained_layout=True)
    a, b = PAPER_LAW
    left.plot(x, a / x + b, "--", color="gray", label="paper, 32B, 8K tokens")
    for batch, (a, b) in laws.items():
        (line,) = left.plot(x, a / x + b, label=f"ours, batch {batch}")
        mine = [row for row in rows if row["batch"] == batch]
        places = [row["num_parallel"] for row in mine]
        left.plot(places, [row["ms_per_token"] for row in mine], "o", color=line.get_color(), markersize=4)
        right.plot(places, [row["speedup"] for row in mine], "o-", color=line.get_color(), markersize=4,
                   label=f"ours, batch {batch}")  # fmt: skip
    right.plot(x, x, ":", color="gray", label="num_parallel")
    found = [(place, speedup) for place, speedups in PAPER_SPEEDUPS.items() for speedup in speedups]
    right.plot(*zip(*found, strict=True), "x", color="gray", markersize=5, label="paper, batch 4 to 128")
    for axis, label in ((left, "ms per token of an answer"), (right, "speedup over one path after the other")):
        axis.set_xlabel("num_parallel")
        axis.set_ylabel(label)
        axis.legend(fontsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    left.set_ylim(bottom=0)
    save_figure(figure, path, dpi=110)


def main() -> None:
    """Write both files."""
    source = Path(sys.argv[1])
    data = json.loads(source.read_text(encoding="utf-8"))
    rows = [row for row in data["rows"] if row["case"].startswith("speedup")]
    joints = [row for row in data["rows"] if "fork_and_join_ms" in row]
    laws = {row["batch"]: (row["a"], row["b"]) for row in data["rows"] if row["case"].startswith("law")}
    environment = data["environment"]
    shape, context = preset(environment["model"]), int(environment["context"].replace(",", ""))
    steps = decode_steps(environment["model"])
    text = TEXT.format(
        **environment,
        columns=f"| {' | '.join(COLUMNS.split('|'))} |",
        rows="\n".join(table_row(row, shape, context, steps) for row in rows),
        steps=f"{', '.join(f'{ms:.2f}' for ms in steps.values())} ms with {', '.join(map(str, steps))} rows"
        if steps
        else "not recorded for this model",
        laws="; ".join(f"batch {batch}: {a:.2f} / num_parallel + {b:.2f}" for batch, (a, b) in laws.items()),
        joints="\n".join(map(joint_row, joints)),
        runs="\n".join(
            f"- {name}, {run['date']}: `{'`, `'.join(run['command'])}`" for name, run in data["runs"].items()
        ),
        image=f"{source.stem}.png",
        **{name: joints[0][name] for name in ("branches", "path_tokens", "prefix")},
    )
    source.with_suffix(".md").write_text(text, encoding="utf-8")
    draw(rows, laws, source.with_suffix(".png"))
    print(f"written: {source.with_suffix('.md')} and .png")


if __name__ == "__main__":
    run_tool(main)
