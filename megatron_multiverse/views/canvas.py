"""What all figures share: colours, axes without a display, writing PNGs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_multiverse.files import save_figure
from megatron_multiverse.views.sample_view import branch_depth

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DEPTH_COLORS = ("#5b6577", "#2b78d0", "#ee8a2a", "#2f9e6e", "#a05bc4")


def color(branch: str) -> str:
    """Colour of a branch: its depth."""
    return DEPTH_COLORS[branch_depth(branch) % len(DEPTH_COLORS)]


def subplots(height: float, ratios: Sequence[float], *, width: float = 11.0) -> tuple[Figure, list[Axes]]:
    """Empty axes, one below the other, with heights in the given ratios (inches for the whole figure)."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        len(ratios),
        1,
        figsize=(width, height),
        sharex=len(ratios) > 1,
        squeeze=False,
        gridspec_kw={"height_ratios": list(ratios)},
        layout="constrained",
    )
    for axis in axes[:, 0]:
        axis.spines[["top", "right"]].set_visible(False)
    return figure, list(axes[:, 0])


def grid(
    rows: int, columns: int, *, width: float, row_height: float | Sequence[float]
) -> tuple[Figure, list[list[Axes]]]:
    """Empty axes that share nothing, by row and column (inches: for the whole width, and for every row or each one)."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    heights = list(row_height) if isinstance(row_height, Sequence) else [row_height] * rows
    figure, axes = plt.subplots(
        rows,
        columns,
        figsize=(width, sum(heights)),
        squeeze=False,
        gridspec_kw={"height_ratios": heights},
        layout="constrained",
    )
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes.tolist()


def count_whole(axis: Axes) -> None:
    """Ticks of the vertical axis at whole numbers: it counts something."""
    from matplotlib.ticker import MaxNLocator

    axis.yaxis.set_major_locator(MaxNLocator(integer=True))


def from_zero(axis: Axes) -> None:
    """Let the vertical axis begin at 0, with room for markers above the largest value, however near the others are."""
    top = axis.get_ylim()[1]
    axis.set_ylim(0, 1.05 * top if top > 0 else 1)


def log_horizontally(axis: Axes) -> None:
    """A logarithmic horizontal axis with numbers as people write them: 60, not 6 x 10^1."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_xscale("log")
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axis.xaxis.set_minor_formatter(NullFormatter())


def save(figure: Figure, path: str | Path) -> None:
    """Write the figure as PNG, making the folder if need be, and free it."""
    save_figure(figure, path, dpi=110)
