"""Bar charts of the results of attention.py: `python -m benchmarks.kernels.plot`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.kernels.record import RESULTS
from megatron_multiverse.cli import parse_options, run_tool
from megatron_multiverse.errors import ConfigError
from megatron_multiverse.files import save_figure

COLORS = {
    "FA2 causal (SDPA)": "#c9c9c9",
    "cuDNN causal (SDPA)": "#9a9a9a",
    "FA4 causal": "#5f6b7a",
    "flex (our lists)": "#e0a458",
    "flash4": "#1f7a8c",
}
"""Drawn in this order; grey for plain causal attention, which has less to do than a mask."""
BASE = "cuDNN causal (SDPA)"
Rows = dict[str, dict[str, dict[str, Any]]]
"""layout -> attention -> row."""


@dataclass
class Options:
    """What to draw."""

    input: str | None = None
    """Results of attention.py, JSON lines; default those of this repository."""
    tokens: int = 32768
    heads: int = 40
    groups: int = 8
    dim: int = 128
    output: str | None = None
    """PNG file; default beside the input."""


def read(file: Path, **shape: int) -> Rows:
    """The rows of one length and shape."""
    rows: Rows = {}
    for line in file.read_text().splitlines():
        row = json.loads(line)
        if "fwd_tflops" in row and all(row[name] == value for name, value in shape.items()):
            rows.setdefault(row["layout"], {})[row["attention"]] = row
    return rows


def drawn_names(rows: Rows) -> list[str]:
    """The attention functions of COLORS that have a row."""
    return [name for name in COLORS if any(name in row for row in rows.values())]


def bars(axes: Any, rows: Rows, value: Any, label: str) -> None:
    """One group of bars per layout, one bar per attention function."""
    present = drawn_names(rows)
    width = 0.8 / len(present)
    for place, name in enumerate(present):
        color = COLORS[name]
        heights = [value(row[name], row) if name in row else 0.0 for row in rows.values()]
        at = [x + (place - (len(present) - 1) / 2) * width for x in range(len(rows))]
        drawn = axes.bar(at, heights, width * 0.92, color=color, label=name)
        if name == "flash4":
            axes.bar_label(drawn, [label.format(x) if x else "" for x in heights], padding=1, fontsize=8, color=color)
    shares = [next(iter(row.values()))["visible"] for row in rows.values()]
    names = [f"{name}\n{share:.0%} visible" for name, share in zip(rows, shares, strict=True)]
    axes.set_xticks(range(len(rows)), names, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)


def figure(rows: Rows, title: str) -> Any:
    """TFLOP/s above, time against cuDNN causal below; forward left, backward right."""
    from matplotlib.figure import Figure

    fig = Figure(figsize=(13, 7.5), layout="constrained")
    grid = fig.subplots(2, 2)
    for column, (key, name) in enumerate((("fwd", "forward"), ("bwd", "backward"))):
        bars(grid[0][column], rows, lambda row, _, k=key: row[f"{k}_tflops"], "{:.0f}")
        grid[0][column].set_title(f"{name}: TFLOP/s on visible pairs", fontsize=10, loc="left")
        bars(grid[1][column], rows, lambda row, all_, k=key: all_[BASE][f"{k}_ms"] / row[f"{k}_ms"], "{:.2f}")
        grid[1][column].set_title(
            f"{name}: times as fast as cuDNN causal on the same sequence", fontsize=10, loc="left"
        )
        grid[1][column].axhline(1, color="#777777", linewidth=0.8)
    handles, labels = grid[0][0].get_legend_handles_labels()
    fig.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize=9)
    fig.suptitle(title, fontsize=11)
    return fig


def main() -> None:
    """Draw one length of the attention results."""
    o = parse_options(Options)
    file = Path(o.input) if o.input else sorted(RESULTS.glob("attention_*.jsonl"))[-1]
    shape = {"tokens": o.tokens, "heads": o.heads, "groups": o.groups, "dim": o.dim}
    rows = read(file, **shape)
    if not rows:
        raise ConfigError(f"{file} has no rows of {shape}: run the benchmark of attention for them")
    first = next(iter(next(iter(rows.values())).values()))
    heads = f"{o.heads} query and {o.groups} key/value heads, d {o.dim}, bfloat16"
    commits = ", ".join(dict.fromkeys(str(row["commit"]) for each in rows.values() for row in each.values()))
    target = Path(o.output) if o.output else file.with_name(f"{file.stem}_{o.tokens}.png")
    title = f"Attention over {o.tokens} tokens on one {first['gpu']}: {heads}; commit {commits}"
    save_figure(figure(rows, title), target, dpi=110)
    print(target)


if __name__ == "__main__":
    run_tool(main)
