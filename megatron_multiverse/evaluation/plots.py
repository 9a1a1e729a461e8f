"""Pictures (PNG) of a run and of a comparison, drawn without a display."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_multiverse.evaluation.compare import Comparison, Interval
from megatron_multiverse.evaluation.samples import Sample
from megatron_multiverse.evaluation.scores import Score, Setting
from megatron_multiverse.evaluation.tasks import Thinking
from megatron_multiverse.views.canvas import DEPTH_COLORS, count_whole, grid, save

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLORS: dict[Thinking, str] = {"parallel": DEPTH_COLORS[1], "sequential": DEPTH_COLORS[2], "none": DEPTH_COLORS[3]}


def draw_scores(scores: Mapping[Setting, Score], samples: Sequence[Sample], path: str | Path) -> None:
    """Draw accuracy, parallelism, lengths and wall clock; with budgets, accuracy over length and over wall clock."""
    has_budgets = len({setting.budget for setting in scores}) > 1
    heights = [max(2.4, 0.3 * len(scores) + 1.2), 3.6, *([4.0] if has_budgets else [])]
    figure, axes = grid(len(heights), 2, width=11.0, row_height=heights)
    _draw_accuracy(axes[0][0], scores)
    _draw_wall_clock(axes[0][1], scores)
    _draw_parallel(axes[1][0], samples)
    _draw_lengths(axes[1][1], samples)
    if has_budgets:
        _draw_budgets(axes[2][0], scores, "token_latency", "mean tokens on the longest chain")
        _draw_budgets(axes[2][1], scores, "seconds", "mean seconds of an answer")
    save(figure, path)


def draw_comparison(comparisons: Sequence[Comparison], path: str | Path) -> None:
    """Draw difference and net speed-up of each setting with their 95 % intervals."""
    figure, axes = grid(1, 2, width=11.0, row_height=0.42 * len(comparisons) + 1.8)
    names = [one.label for one in comparisons]
    differences = [Interval(*(100 * value for value in vars(one.difference).values())) for one in comparisons]
    _draw_intervals(axes[0][0], names, differences, 0.0, "accuracy of the second minus\nthat of the first, points")
    speedups = [one.speedup for one in comparisons]
    _draw_intervals(
        axes[0][1], [""] * len(names), speedups, 1.0, "net speed-up in wall clock\n(first / second; 1: none)"
    )
    save(figure, path)


def _draw_intervals(axis: Axes, names: Sequence[str], found: Sequence[Interval], zero: float, label: str) -> None:
    values = [one.value for one in found]
    # A bootstrap interval may lie beside its value, where matplotlib takes no error bar.
    errors = [[max(one.value - one.low, 0) for one in found], [max(one.high - one.value, 0) for one in found]]
    axis.errorbar(values, range(len(found)), xerr=errors, fmt="o", color=DEPTH_COLORS[1], capsize=4)
    axis.axvline(zero, color="black", linewidth=0.8, linestyle=":")
    axis.set(yticks=range(len(found)), yticklabels=names, xlabel=label, ylim=(len(found) - 0.5, -0.5))


def _draw_accuracy(axis: Axes, scores: Mapping[Setting, Score]) -> None:
    values = [100 * score.accuracy for score in scores.values()]
    errors = [100 * (score.stderr_seeds or score.stderr_problems or 0) for score in scores.values()]
    colors = [_COLORS[setting.thinking] for setting in scores]
    axis.barh(range(len(scores)), values, xerr=errors, color=colors, capsize=3)
    axis.set(yticks=range(len(scores)), yticklabels=[setting.label for setting in scores], xlim=(0, 100))
    axis.set(title="accuracy", xlabel="pass@1, % (bars: standard error)")
    _show_rows(axis, len(scores))


def _draw_parallel(axis: Axes, samples: Sequence[Sample]) -> None:
    groups = _by_thinking(samples)
    shares = {how: [one.tokens / max(one.critical_tokens, 1) for one in chosen] for how, chosen in groups.items()}
    _draw_histogram(axis, shares)
    axis.set(title="# parallel", xlabel="tokens / longest chain, of each answer", ylabel="answers")
    count_whole(axis)


def _draw_lengths(axis: Axes, samples: Sequence[Sample]) -> None:
    for thinking, chosen in _by_thinking(samples).items():
        for correct, marker in ((True, "o"), (False, "x")):
            dots = [sample for sample in chosen if sample.correct is correct]
            if dots:
                xs, ys = [sample.tokens for sample in dots], [sample.critical_tokens for sample in dots]
                label = f"{thinking}, {'right' if correct else 'wrong'}"
                axis.scatter(xs, ys, s=14, marker=marker, alpha=0.6, color=_COLORS[thinking], label=label)
    longest = max(sample.tokens for sample in samples)
    axis.plot([0, longest], [0, longest], color="#aaaaaa", linestyle=":", label="one token at a time")
    axis.set(title="length of answers", xlabel="tokens, all branches", ylabel="tokens on the longest chain")
    axis.legend(frameon=False, fontsize=8)


def _draw_wall_clock(axis: Axes, scores: Mapping[Setting, Score]) -> None:
    """Bars beside those of the accuracy, whose names stand for both."""
    colors = [_COLORS[setting.thinking] for setting in scores]
    axis.barh(range(len(scores)), [score.seconds for score in scores.values()], color=colors)
    at_once = sorted({number for score in scores.values() for number in score.concurrency})
    axis.set(yticks=range(len(scores)), yticklabels=[])
    axis.set(title="wall clock", xlabel=f"mean seconds of an answer, {' or '.join(map(str, at_once))} under way")
    _show_rows(axis, len(scores))


def _show_rows(axis: Axes, count: int) -> None:
    """The first bar at the top; few bars stay thin."""
    axis.set_ylim(max(count, 4) - 0.5, -0.5)


def _draw_budgets(axis: Axes, scores: Mapping[Setting, Score], name: str, label: str) -> None:
    """A line for each task and way of thinking from the smallest budget to the largest, each point with its budget."""
    lines: dict[tuple[str, Thinking], list[tuple[float, float, float]]] = {}
    for setting, score in scores.items():
        budget = math.inf if setting.budget is None else setting.budget
        point = (budget, float(getattr(score, name)), 100 * score.accuracy)
        lines.setdefault((setting.task, setting.thinking), []).append(point)
    markers = dict(zip(dict.fromkeys(task for task, _ in lines), cycle("osD^vP*X")))
    for (task, thinking), points in lines.items():
        budgets, xs, ys = zip(*sorted(points), strict=True)
        axis.plot(xs, ys, marker=markers[task], color=_COLORS[thinking], label=f"{task}, {thinking}")
        place = (4, -9) if thinking == "parallel" else (4, 4)
        for budget, x, y in zip(budgets, xs, ys, strict=True):
            text = "none" if math.isinf(budget) else f"{budget:.0f}"
            axis.annotate(text, (x, y), place, textcoords="offset points", fontsize=7, color=_COLORS[thinking])
    axis.set(title="accuracy over budgets", xlabel=label, ylabel="pass@1, %", ylim=(-8, 108))
    axis.margins(x=0.12)
    axis.legend(frameon=False, fontsize=8)


def _by_thinking(samples: Sequence[Sample]) -> dict[Thinking, list[Sample]]:
    groups: dict[Thinking, list[Sample]] = {}
    for sample in samples:
        groups.setdefault(sample.thinking, []).append(sample)
    return groups


def _draw_histogram(axis: Axes, groups: Mapping[Thinking, Sequence[float]]) -> None:
    every = [value for values in groups.values() for value in values]
    low, high = min(every), max(every)
    bins = [low + max(high - low, 0.1) * k / 24 for k in range(25)]
    for thinking, values in groups.items():
        axis.hist(values, bins=bins, color=_COLORS[thinking], alpha=0.6, label=thinking)
    axis.legend(frameon=False, fontsize=8)
