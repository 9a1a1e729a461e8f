"""The picture in a report: does the structure pay, how parallel is it, and what blocks are there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_multiverse.curation.plan import KINDS
from megatron_multiverse.files import save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_BEFORE, _AFTER, _COLLECTIVE, _SELECTIVE = "#b8b8b8", "#2f6f9f", "#2f6f9f", "#c8792b"


def draw_report(
    ratios: Sequence[tuple[float, float]],
    parallel: Sequence[float],
    kinds: Mapping[str, int],
    paths: Mapping[int, int],
    tokens: str,
    file: Path,
) -> None:
    """Draw four panels into a PNG.

    Args:
        ratios: critical path / plain text of each sample, before and after blocks without gain were flattened.
        parallel: tokens / critical path of each sample.
        kinds: number of blocks by kind.
        paths: number of blocks by number of paths.
        tokens: what was counted.
        file: where the picture goes.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import MaxNLocator

    figure, axes = plt.subplots(2, 2, figsize=(11, 7.5), layout="constrained")
    _draw_ratios(axes[0, 0], ratios)
    axes[0, 1].hist(parallel, bins=20, color=_AFTER)
    axes[0, 1].set(xlabel="tokens / critical path", ylabel="samples", title="# parallel")
    _draw_kinds(axes[1, 0], kinds)
    widths = range(1, max(paths, default=2) + 1)
    axes[1, 1].bar(widths, [paths.get(width, 0) for width in widths], color=_AFTER)
    axes[1, 1].set(xlabel="paths", ylabel="blocks", title="paths per block", xticks=list(widths))
    for axis in axes.flat:
        (axis.xaxis if axis is axes[1, 0] else axis.yaxis).set_major_locator(MaxNLocator(integer=True))
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{len(parallel)} samples, lengths in {tokens}", fontsize=10)
    save_figure(figure, file, dpi=110)


def _draw_ratios(axis: Axes, ratios: Sequence[tuple[float, float]]) -> None:
    low = min(min(pair) for pair in ratios)
    high = max(1.02, *(max(pair) for pair in ratios))
    bins = [low + (high - low) * k / 24 for k in range(25)]
    axis.hist([before for before, _ in ratios], bins=bins, color=_BEFORE, label="before")
    axis.hist([after for _, after in ratios], bins=bins, histtype="step", linewidth=2, color=_AFTER, label="after")
    axis.axvline(1.0, color="black", linewidth=0.8, linestyle=":")
    axis.set(xlabel="critical path / plain text (below 1 it pays)", ylabel="samples")
    axis.set_title("steps, before and after flattening blocks without gain")
    axis.legend(frameon=False)


def _draw_kinds(axis: Axes, kinds: Mapping[str, int]) -> None:
    names = list(KINDS)[::-1]
    colors = [_COLLECTIVE if KINDS[name] == "collective" else _SELECTIVE for name in names]
    axis.barh([name.replace("_", " ") for name in names], [kinds.get(name, 0) for name in names], color=colors)
    axis.set(xlabel="blocks", title="kinds (blue: all paths needed, orange: alternatives)")
