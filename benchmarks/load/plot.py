"""The picture of a load benchmark: time per token, width and goodput over the trace."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_multiverse.files import save_figure

COLORS = {"never fork": "#9a9a9a", "always fork": "#e0a458", "by step time": "#1f7a8c"}
ROWS = (
    ("step_ms", "milliseconds per step"),
    ("rows", "branches per step"),
    ("good_tokens", "tokens/s within the promise"),
)


def draw(results: dict[str, Any], output: Path) -> None:
    """Draw the series of all traces into a PNG.

    Args:
        results: what `__main__` writes.
        output: the file.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    traces = results["traces"]
    figure, axes = plt.subplots(len(ROWS), len(traces), figsize=(4.6 * len(traces), 7.2), sharex="col", squeeze=False)
    for column, (name, runs) in enumerate(traces.items()):
        for row, (key, label) in enumerate(ROWS):
            ax = axes[row][column]
            for policy, run in runs.items():
                ax.plot(run["series"]["seconds"], run["series"][key], color=COLORS[policy], label=policy, lw=1.3)
            ax.spines[["top", "right"]].set_visible(False)
            ax.set_ylim(bottom=0)
            if key == "step_ms":
                ax.set_ylim(top=max(58, ax.get_ylim()[1]))
                ax.axhline(50, color="#b33", lw=0.9, ls="--")
            if column == 0:
                ax.set_ylabel(label)
        axes[0][column].set_title(name)
        users = next(iter(runs.values()))["series"]
        twin = axes[0][column].twinx()
        twin.fill_between(users["seconds"], users["users"], step="post", color="#1f7a8c", alpha=0.08, lw=0)
        twin.set_ylim(0, 2 * max(users["users"]))
        twin.set_yticks([0, max(users["users"])])
        twin.spines[["top", "left"]].set_visible(False)
        if column == len(traces) - 1:
            twin.set_ylabel("users (shaded)")
        axes[-1][column].set_xlabel("seconds")
    axes[0][0].text(0, 51, "promised: 50 ms", color="#b33", fontsize=8, va="bottom")
    axes[1][0].legend(frameon=False, loc="lower center")
    figure.tight_layout()
    save_figure(figure, output, dpi=110)
