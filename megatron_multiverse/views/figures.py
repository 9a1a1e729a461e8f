"""Pictures (PNG) of structure and decoding, drawn without a display.

`draw_timeline`: which branch ran when. `draw_visibility`: who sees whom. `draw_positions`: position of each token.
Colours mean depth everywhere: grey outside of blocks, blue in paths, orange in nested paths, green below those.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_multiverse.structure import TAGS, BlockSpan, visible_matrix
from megatron_multiverse.views.canvas import DEPTH_COLORS, color, save, subplots
from megatron_multiverse.views.sample_view import SampleView, Stretch, branch_depth

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from megatron_multiverse.inference import TimelineSpan

HIDDEN_COLOR, FUTURE_COLOR = "#f3c6c6", "#ffffff"
MOST_LABELLED_TOKENS = 130
"""With more tokens than that their texts would not be readable and are left out."""


def draw_timeline(
    spans: Sequence[TimelineSpan],
    path: str | Path,
    *,
    sequential: Sequence[TimelineSpan] = (),
    labels: Mapping[str, str] | None = None,
    title: str = "Branches over decode steps",
    unit: str = "tokens",
) -> None:
    """Draw one lane per branch, with forks and joins, and below it the same text decoded sequentially.

    Args:
        spans: `Result.timeline` of the engine, or `sample_view.ideal_timeline`.
        path: PNG file to write.
        sequential: the timeline of the same request with one branch at a time.
        labels: text beside a lane, by branch name (for example the outline).
        title: line above the picture.
        unit: what is decoded, one of them in each step of a branch.

    Raises:
        ValueError: spans is empty.
    """
    if not spans:
        raise ValueError("there is nothing to draw: spans is empty")
    lanes = sorted({span.branch for span in spans}, key=_lane_order)
    height = 0.34 * len(lanes) + (1.1 if sequential else 0.0) + 1.5
    figure, axes = subplots(height, [0.34 * len(lanes) + 0.3, 0.55] if sequential else [1.0])
    _draw_lanes(axes[0], spans, lanes, labels or {})
    steps = max(span.end for span in spans)
    tokens = sum(span.tokens for span in spans)
    axes[0].set_title(title, loc="left", fontsize=12, fontweight="bold", pad=20)
    parts = [f"in parallel: {tokens} {unit} in {steps} steps"]
    longest = max(span.end for span in [*spans, *sequential])
    if sequential:
        _draw_sequential(axes[1], sequential)
        parts.append(f"one branch at a time: {longest} steps ({longest / steps:.2f} x)")
    axes[0].text(0, 1.02, "   ".join(parts), transform=axes[0].transAxes, fontsize=9, color="#444444")
    for axis in axes:
        axis.set_xlim(0, longest * 1.01)
    axes[-1].set_xlabel("decode step")
    save(figure, path)


def draw_visibility(view: SampleView, path: str | Path, *, title: str = "Who sees whom") -> None:
    """Draw the attention mask: a row per token (query), a column per token it may look at (key).

    Args:
        view: the sample.
        path: PNG file to write.
        title: line above the picture.
    """
    from matplotlib.colors import to_rgb
    from matplotlib.patches import Patch

    n = len(view.pieces)
    depth = np.concatenate([[s.depth] * (s.end - s.start) for s in view.stretches]).astype(int)
    palette = np.array([to_rgb(color) for color in DEPTH_COLORS])[depth % len(DEPTH_COLORS)]
    visible = visible_matrix(view.layout)
    earlier = np.tri(n, dtype=bool)
    image = np.empty((n, n, 3))
    image[:] = to_rgb(FUTURE_COLOR)
    image[earlier] = to_rgb(HIDDEN_COLOR)
    image[visible] = np.broadcast_to(palette[None, :, :], (n, n, 3))[visible]

    figure, axes = subplots(9.0 if n > 60 else 7.5, [1.0], width=9.5 if n > 60 else 8.0)
    axis = axes[0]
    axis.imshow(image, interpolation="nearest")
    for stretch in view.stretches[1:]:
        for line in (axis.axhline, axis.axvline):
            line(stretch.start - 0.5, color="#ffffff", linewidth=0.8, alpha=0.9)
    _label_tokens(axis, view)
    for stretch in view.stretches:
        if stretch.branch:
            _name_square(axis, stretch, n)
    axis.set_xlabel("key: the token that is looked at")
    axis.set_ylabel("query: the token that looks")
    axis.set_title(title, loc="left", fontsize=12, fontweight="bold")
    names = ["outside of blocks", "in a path", "in a nested path", "nested deeper", "deeper still"]
    legend = [Patch(color=DEPTH_COLORS[k], label=f"visible, key {names[k]}") for k in sorted(set(depth.tolist()))[:5]]
    legend.append(Patch(color=HIDDEN_COLOR, label="earlier, but hidden: another path"))
    legend.append(Patch(facecolor="white", edgecolor="#999999", label="later in the text"))
    axis.legend(handles=legend, loc="upper right", fontsize=8, framealpha=1.0)
    save(figure, path)


def draw_positions(view: SampleView, path: str | Path, *, title: str = "Position of each token") -> None:
    """Draw position over place in the text: sibling paths start at the same position.

    Args:
        view: the sample.
        path: PNG file to write.
        title: line above the picture.
    """
    positions = view.layout.position_ids
    n = len(view.pieces)
    few = n <= MOST_LABELLED_TOKENS
    figure, axes = subplots(5.2, [1.0], width=11.0)
    axis = axes[0]
    axis.plot([0, n - 1], [0, n - 1], linestyle=":", color="#aaaaaa", label="position = place (plain text)")
    for stretch in view.stretches:
        where = np.arange(stretch.start, stretch.end)
        style: dict[str, Any] = {"marker": "o", "markersize": 4} if few else {"linewidth": 2}
        axis.plot(where, positions[where], color=color(stretch.branch), **style)
    for _, block in view.document.walk():
        if block.paths:
            _mark_levels(axis, block, positions)
    for stretch in _first_stretches(view.stretches):
        start = int(positions[stretch.start])
        axis.annotate(
            f"path {stretch.branch}",
            (stretch.start, start),
            xytext=(2, -14),
            textcoords="offset points",
            fontsize=9,
            color=color(stretch.branch),
        )
    _mark_tags(axis, view, positions, few)
    axis.set_xlabel("place in the text (token index)")
    axis.set_ylabel("position id")
    axis.set_xlim(-1, n)
    axis.set_title(title, loc="left", fontsize=12, fontweight="bold")
    axis.grid(alpha=0.25)
    axis.legend(loc="upper left", fontsize=8)
    save(figure, path)


def _draw_lanes(axis: Axes, spans: Sequence[TimelineSpan], lanes: Sequence[str], labels: Mapping[str, str]) -> None:
    row = {lane: number for number, lane in enumerate(lanes)}
    blocks: dict[int, list[TimelineSpan]] = {}
    for span in spans:
        if span.block:
            blocks.setdefault(span.block, []).append(span)
    for members in blocks.values():
        fork, join = min(span.start for span in members), max(span.end for span in members)
        rows = [row[span.branch] for span in members]
        parent = row.get(members[0].branch.rpartition(".")[0], min(rows))
        for when in (fork, join):
            axis.plot([when, when], [parent, max(rows)], color="#9aa3b2", linewidth=1.0, zorder=1)
        for branch in {span.branch for span in members}:
            own = max(span.end for span in members if span.branch == branch)
            axis.plot([own, join], [row[branch]] * 2, color="#9aa3b2", linewidth=1.0, linestyle=":", zorder=1)
    for span in spans:
        axis.barh(row[span.branch], span.end - span.start, left=span.start, height=0.62, color=color(span.branch))
        if span.branch:
            axis.text(
                span.start + 0.5,
                row[span.branch],
                f" {span.tokens}",
                va="center",
                fontsize=7,
                color="white",
                clip_on=True,
            )
    names = [_lane_name(lane, labels) for lane in lanes]
    axis.set_yticks(range(len(lanes)), names, fontsize=9)
    axis.set_ylim(len(lanes) - 0.45, -0.6)
    axis.tick_params(axis="y", length=0)


def _draw_sequential(axis: Axes, spans: Sequence[TimelineSpan]) -> None:
    longest = max(span.end for span in spans)
    for span in spans:
        width = span.end - span.start
        axis.barh(0, width, left=span.start, height=0.62, color=color(span.branch), edgecolor="white", linewidth=0.6)
        if span.branch and width > longest / 40:
            axis.text(
                span.start + width / 2,
                0,
                span.branch,
                ha="center",
                va="center",
                fontsize=7,
                color="white",
                clip_on=True,
            )
    axis.set_yticks([0], ["one branch\nat a time"], fontsize=9)
    axis.tick_params(axis="y", length=0)
    axis.set_ylim(0.5, -0.5)


def _label_tokens(axis: Axes, view: SampleView) -> None:
    if len(view.pieces) > MOST_LABELLED_TOKENS:
        return
    names = [_shown(piece) for piece in view.pieces]
    size = 7 if len(names) <= 60 else 5.2
    axis.set_yticks(range(len(names)), names, fontsize=size, family="monospace")
    axis.set_xticks(range(len(names)), names, fontsize=size, family="monospace", rotation=90)
    for tick, piece in zip([*axis.get_yticklabels(), *axis.get_xticklabels()], [*view.pieces] * 2, strict=True):
        if piece in TAGS:
            tick.set_color("#b03060")


def _name_square(axis: Axes, stretch: Stretch, n: int) -> None:
    if stretch.end - stretch.start >= max(3, n // 40):
        axis.text(
            stretch.end - 0.2,
            stretch.start - 0.2,
            f"path {stretch.branch}",
            fontsize=8,
            va="top",
            color=color(stretch.branch),
        )


def _mark_tags(axis: Axes, view: SampleView, positions: Any, few: bool) -> None:
    shown = TAGS if few else ("<Parallel>", "</Goal>", "<Conclusion>")
    for index, piece in enumerate(view.pieces):
        if piece in shown and index >= view.document.prompt_length:
            axis.plot(index, positions[index], marker="s", markersize=5, color="#b03060", zorder=3)
            if piece in ("</Goal>", "</Path>", "<Conclusion>"):
                above = piece in ("</Path>", "</Goal>")
                axis.annotate(
                    piece,
                    (index, positions[index]),
                    xytext=(0, 7 if above else -11),
                    textcoords="offset points",
                    ha="right" if above else "left",
                    fontsize=6.5,
                    color="#b03060",
                )


def _mark_levels(axis: Axes, block: BlockSpan, positions: Any) -> None:
    """Draw two level lines: at the position where all paths of the block start, and where the longest of them ends."""
    longest = max(block.paths, key=lambda path: int(positions[path.end - 1]))
    for first, last, level in (
        (block.goal_end, block.paths[-1].start, positions[block.goal_end]),
        (longest.end - 1, block.region_end, positions[longest.end - 1]),
    ):
        axis.plot([first, last], [level, level], color="#9aa3b2", linewidth=0.9, linestyle="--", zorder=1)
    level = int(positions[block.goal_end])
    axis.annotate(
        f"all paths start at {level}",
        (block.paths[-1].start, level),
        xytext=(24, -3),
        textcoords="offset points",
        fontsize=8,
        color="#666666",
    )


def _first_stretches(stretches: Sequence[Stretch]) -> list[Stretch]:
    first: dict[tuple[str, int], Stretch] = {}
    for stretch in stretches:
        if stretch.branch:
            first.setdefault((stretch.branch, stretch.block), stretch)
    return list(first.values())


def _shown(piece: str) -> str:
    return piece.strip()[:14]  # newlines and blanks stay empty: there are many, and they say little


def _lane_order(branch: str) -> tuple[int, ...]:
    return tuple(int(number) for number in branch.split(".")) if branch else ()


def _lane_name(branch: str, labels: Mapping[str, str]) -> str:
    name = "    " * max(0, branch_depth(branch) - 1) + (f"path {branch}" if branch else "root")
    return f"{name}   {labels[branch]}" if labels.get(branch) else name
