"""Draws what two GPUs measured: layouts of half of a published model beside transformers under FSDP2.

    python -m benchmarks.report_training

Reads the rows of benchmarks/results/training_layouts_h200.jsonl that two GPUs trained 14 layers in, and writes
benchmarks/results/training_beside_fsdp.png.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_multiverse.cli import run_tool
from megatron_multiverse.files import save_figure

RESULTS = Path(__file__).parent / "results"
ROWS = ("4 x 32768 packed", "4 x 16384 packed", "2 x 16384 packed")
"""Rows of a step, as results name them; a panel each."""
MODEL = "qwen2.5-7b, 14 layers"


def two_gpus(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows that are drawn."""
    return [row for row in rows if row["gpus"] == 2 and row["model"] == MODEL]


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Bars of tokens per second and GPU, one panel for each kind of rows."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = [[row for row in rows if row["rows"] == kind] for kind in ROWS]
    heights = [max(1, len(panel)) for panel in panels]
    figure, axes = plt.subplots(
        len(ROWS), 1, figsize=(9, 2.2 + 0.34 * sum(heights)), constrained_layout=True, height_ratios=heights
    )
    most = max(row.get("tokens_per_s_per_gpu", 0) for row in rows)
    for axis, kind, panel in zip(axes, ROWS, panels, strict=True):
        panel = sorted(panel, key=lambda row: row.get("tokens_per_s_per_gpu", 0))
        speeds = [row.get("tokens_per_s_per_gpu", 0) for row in panel]
        colours = ["tab:orange" if "transformers" in row["layout"] else "tab:blue" for row in panel]
        bars = axis.barh([row["layout"] for row in panel], speeds, color=colours, height=0.7)
        axis.bar_label(bars, [label(row) for row in panel], padding=4, fontsize=8)
        axis.set_xlim(0, most * 1.75)
        axis.set_title(f"{in_words(kind)} tokens a step", fontsize=10)
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    axes[-1].set_xlabel("tokens per second and GPU")
    save_figure(figure, path, dpi=110)


def in_words(kind: str) -> str:
    """Rows of a step as documents write them: 4 x 32768 packed -> 4 x 32,768."""
    count, tokens = kind.removesuffix(" packed").split(" x ")
    return f"{count} x {int(tokens):,}"


def label(row: dict[str, Any]) -> str:
    """What stands beside a bar."""
    if "result" in row:
        return str(row["result"])
    return f"{row['tokens_per_s_per_gpu']:,.0f}; {row['peak_gib']:.0f} GiB, {recomputed(row)} recomputed"


def recomputed(row: dict[str, Any]) -> str:
    """What a row's run computed again in its backward pass."""
    words: str = row["recompute"].removeprefix("full, ").removesuffix(" of a stage")
    return {"none": "nothing", "full": "all layers"}.get(words, words)


def main() -> None:
    """Write the file."""
    path = RESULTS / "training_beside_fsdp.png"
    lines = (RESULTS / "training_layouts_h200.jsonl").read_text(encoding="utf-8").splitlines()
    draw(two_gpus([json.loads(line) for line in lines]), path)
    print(f"written: {path}")


if __name__ == "__main__":
    run_tool(main)
