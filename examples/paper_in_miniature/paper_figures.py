"""The figures of the miniature; the paper's own curves are drawn beside ours where it gives them as formulas."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_multiverse.views.canvas import DEPTH_COLORS, from_zero, grid, save

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLORS = {"plain": DEPTH_COLORS[2], "tagged": DEPTH_COLORS[3], "multiverse": DEPTH_COLORS[1]}
TRAINED = 4
"""Most chains and most variables of training rows, as training_rows.py says, which needs torch."""
PAPER_FIT = (15.43, 0.60)
"""a and b of a / x + b, milliseconds of a token at # parallel x; 32B, 8K tokens (arXiv 2506.09991, Figure 8a)."""


def fit_latency(rows: list[Any]) -> tuple[float, float] | None:
    """a and b of a / x + b through the milliseconds of a token of each answer over its # parallel x; None if all
    answers are equally parallel."""
    inverse = np.array([row["critical"] / max(row["tokens"], 1) for row in rows])
    if np.ptp(inverse) < 1e-6:
        return None
    latency = np.array([1000 * row["seconds"] / max(row["tokens"], 1) for row in rows])
    slope, offset = np.polyfit(inverse, latency, 1)
    return float(slope), float(offset)


def formula(fit: tuple[float, float]) -> str:
    """The words for a fit of `fit_latency`."""
    return f"{fit[0]:.3f} / x {'+' if fit[1] >= 0 else '-'} {abs(fit[1]):.3f}"


def right_in_all(alone: Mapping[str, list[Any]]) -> dict[int, dict[str, list[Any]]]:
    """Number of chains -> mode -> rows of the problems that every mode answered right. The others are no measure: a
    wrong answer ends at any length."""
    rows = zip(*alone.values(), strict=True)
    kept = [dict(zip(alone, row, strict=True)) for row in rows if all(one["right"] for one in row)]
    chains = sorted({row["chains"] for row in alone["parallel"]})
    return {k: {mode: [row[mode] for row in kept if row[mode]["chains"] == k] for mode in alone} for k in chains}


def mean_of_right(found: Mapping[str, list[float]], measure: str) -> float | None:
    """Mean over the right answers of a set; None if fewer than half are right, which then are the shortest."""
    values = [value for value, right in zip(found[measure], found["right"], strict=True) if right]
    return mean(values) if values and 2 * len(values) >= len(found["right"]) else None


def draw_speed(alone: Mapping[str, Any], batched: Mapping[str, Any], path: Path) -> None:
    """Net speedup over the number of paths; right answers over the time that is given; milliseconds of a token over
    # parallel; speedup over the batch."""
    figure, ((net, within), (latency, batch)) = grid(2, 2, width=12.0, row_height=4.2)
    _draw_net(net, alone)
    _draw_time(within, alone)
    _draw_latency(latency, alone["parallel"])
    _draw_batch(batch, batched)
    save(figure, path)


def _draw_net(axis: Axes, alone: Mapping[str, list[Any]]) -> None:
    for rival, style, color, label in (
        ("plain", "o-", COLORS["multiverse"], "net: over plain"),
        ("one branch at a time", "s--", DEPTH_COLORS[0], "over the same text, branch after branch"),
    ):
        right = right_in_all({mode: alone[mode] for mode in {rival, "one branch at a time", "parallel"}})
        paths = [chains for chains, rows in right.items() if rows["parallel"]]
        slow, fast = (
            np.array([mean(row["seconds"] for row in right[chains][mode]) for chains in paths])
            for mode in (rival, "parallel")
        )
        axis.plot(paths, slow / fast, style, color=color, label=label)
    axis.axhline(1, color="black", linewidth=0.8, linestyle=":")
    axis.set(title="wall clock of one answer", xlabel="paths", ylabel="speedup")
    axis.set_xticks(sorted({row["chains"] for row in alone["parallel"]}))
    from_zero(axis)
    axis.legend(frameon=False, fontsize=8)


def right_within(rows: list[Any], seconds: float) -> float:
    """Percent of all answers that were right and there within a time."""
    return 100 * mean(float(bool(row["right"]) and row["seconds"] <= seconds) for row in rows)


def up_to_trained(alone: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
    """The answers of each mode to problems no larger than those of the training."""
    return {mode: [row for row in rows if row["chains"] <= TRAINED] for mode, rows in alone.items()}


def _draw_time(axis: Axes, alone: Mapping[str, list[Any]]) -> None:
    """The paper's Figure 7, with the generation time itself on the horizontal axis."""
    rows = up_to_trained(alone)
    longest = max(row["seconds"] for found in rows.values() for row in found)
    times = np.linspace(0, 1.02 * longest, 300)
    for mode, style, color, label in (
        ("plain", "-", COLORS["plain"], "plain"),
        ("one branch at a time", "--", DEPTH_COLORS[0], "multiverse, branch after branch"),
        ("parallel", "-", COLORS["multiverse"], "multiverse"),
    ):
        shares = [right_within(rows[mode], time) for time in times]
        axis.plot(1000 * times, shares, style, color=color, label=label)
    title = f"up to {TRAINED} paths, one answer at a time: right within a time"
    axis.set(title=title, xlabel="milliseconds given", ylabel="right, %", ylim=(-3, 108))
    axis.legend(frameon=False, fontsize=8)


def _draw_latency(axis: Axes, rows: list[Any]) -> None:
    xs = np.array([row["tokens"] / max(row["critical"], 1) for row in rows])
    axis.scatter(xs, [1000 * row["seconds"] / max(row["tokens"], 1) for row in rows], s=14, color=COLORS["multiverse"])
    fit, line = fit_latency(rows), np.linspace(1, max(xs.max(), 1.1), 50)
    if fit is not None:
        axis.plot(line, fit[0] / line + fit[1], color=COLORS["multiverse"], label=formula(fit))
        scale = sum(fit) / sum(PAPER_FIT)
        label = f"paper, 32B: {PAPER_FIT[0]} / x + {PAPER_FIT[1]}, times {scale:.2g}"
        axis.plot(line, scale * (PAPER_FIT[0] / line + PAPER_FIT[1]), ":", color=DEPTH_COLORS[0], label=label)
        axis.legend(frameon=False, fontsize=8)
    axis.set(title="latency of a token, batch 1", xlabel="# parallel", ylabel="milliseconds per token")
    from_zero(axis)


def _draw_batch(axis: Axes, batched: Mapping[str, list[Any]]) -> None:
    batches = [row["batch"] for row in batched["parallel"]]

    def seconds(mode: str) -> np.ndarray[Any, Any]:
        return np.array([row["seconds"] for row in batched[mode]])

    is_measure = np.array([row["right"] >= 0.9 * row["batch"] for row in batched["plain"]])
    net = np.where(is_measure, seconds("plain") / seconds("parallel"), np.nan)
    axis.plot(batches, net, "o-", color=COLORS["multiverse"], label="net: over plain")
    serial = seconds("one branch at a time") / seconds("parallel")
    axis.plot(batches, serial, "s--", color=DEPTH_COLORS[0], label="over the same text, branch after branch")
    shape = [row["tokens"] / max(row["critical"], 1) for row in batched["parallel"]]
    axis.plot(batches, shape, ":", color=DEPTH_COLORS[0], label="paper: # parallel, whatever the batch")
    axis.axhline(1, color="black", linewidth=0.8, linestyle=":")
    axis.set_xscale("log", base=2)
    axis.set(title="wall clock of a batch, four paths each", xlabel="answers at once", ylabel="speedup")
    axis.set_xticks(batches, [str(batch) for batch in batches])
    from_zero(axis)
    axis.legend(frameon=False, fontsize=8)


def draw_lengths(lengths: Mapping[str, Any], path: Path) -> None:
    """Tokens of right answers over the number of paths, and over the size of a search."""
    figure, ((chains, variables),) = grid(1, 2, width=12.0, row_height=4.2)
    for axis, name, what in (
        (chains, "chains", "independent chains"),
        (variables, "variables", "variables of a search"),
    ):
        sizes = [row["size"] for row in lengths[name]]
        for key, label, color, form in (
            ("plain", "plain text: one token after the other", COLORS["plain"], "o-"),
            ("tagged", "parallel text: all tokens", DEPTH_COLORS[0], "s--"),
            ("critical", "parallel text: longest chain", COLORS["multiverse"], "o-"),
        ):
            axis.plot(sizes, [row[key] for row in lengths[name]], form, color=color, label=label)
        axis.set(title=f"right answers over {what}", xlabel=what, ylabel="tokens, mean", xticks=sizes)
        from_zero(axis)
        axis.legend(frameon=False, fontsize=8)
    save(figure, path)


def draw_accuracy(results: Mapping[str, Any], path: Path) -> None:
    """Right answers over the size of a problem; over the steps that are given; steps over the size of a search."""
    figure, ((chains, budget), (variables, search)) = grid(2, 2, width=12.0, row_height=4.0)
    _draw_sizes(chains, results, "chains")
    _draw_budget(budget, results)
    _draw_sizes(variables, results, "variables")
    _draw_search(search, results)
    save(figure, path)


def _runs(results: Mapping[str, Any]) -> dict[str, list[Any]]:
    return {
        kind: found
        for kind in COLORS
        if (found := [run for name, run in results.items() if name.removeprefix(f"{kind}-").isdigit()])
    }


def _sizes(run: Any, task: str) -> dict[int, Any]:
    return {int(name.split("-")[1]): found for name, found in run["sets"].items() if name.startswith(task)}


def _draw_sizes(axis: Axes, results: Mapping[str, Any], task: str) -> None:
    lines = {kind: (runs, COLORS[kind], "o-") for kind, runs in _runs(results).items()}
    singles = {
        "chains": (("multiverse", "fixed-labels", "labels from 1"), ("multiverse", "no-links", "no links")),
        "variables": (
            ("plain", "plain-back-links-0", "links back"),
            ("tagged", "tagged-back-links-0", "links back"),
            ("multiverse", "back-links-0", "links back"),
        ),
    }
    for (kind, name, title), form in zip(singles[task], ("x:", "x--", "^--"), strict=False):
        if name in results:
            lines[f"{kind}, {title}"] = [results[name]], COLORS[kind], form
    for label, (runs, color, form) in lines.items():
        values = {
            size: [100 * mean(_sizes(run, task)[size]["right"]) for run in runs] for size in _sizes(runs[0], task)
        }
        means = [mean(found) for found in values.values()]
        errors = [[m - min(v) for m, v in zip(means, values.values(), strict=True)],
                  [max(v) - m for m, v in zip(means, values.values(), strict=True)]]  # fmt: skip
        axis.errorbar(list(values), means, yerr=errors, fmt=form, color=color, capsize=3, label=label, alpha=0.85)
    axis.axvspan(TRAINED + 0.1, max(values) + 0.2, color="#00000010", label="more than trained")
    axis.set(title=f"right answers over {task}", xlabel=task, ylabel="right, %", ylim=(-3, 103), xticks=list(values))
    axis.legend(loc="center left" if task == "chains" else "lower left", frameon=False, fontsize=8)


def _draw_budget(axis: Axes, results: Mapping[str, Any]) -> None:
    longest = max(max(_sizes(runs[0], "chains")[4]["steps"]) for runs in _runs(results).values())
    budgets = np.linspace(0, longest, 200)
    for kind, runs in _runs(results).items():
        found = [_sizes(run, "chains")[4] for run in runs]
        pairs = [pair for one in found for pair in zip(one["right"], one["steps"], strict=True)]
        share = [100 * mean(float(right and steps <= budget) for right, steps in pairs) for budget in budgets]
        axis.plot(budgets, share, color=COLORS[kind], label=kind)
    axis.set(title="four chains: right within a budget", xlabel="decode steps given", ylabel="right, %", ylim=(-3, 103))
    axis.legend(frameon=False, fontsize=8)


def searcher(results: Mapping[str, Any]) -> str:
    """The run whose searches are measured: one that goes beyond its training, if it is there."""
    return "back-links-0" if "back-links-0" in results else "multiverse-0"


def _draw_search(axis: Axes, results: Mapping[str, Any]) -> None:
    for run, measure, label, color in (
        ("plain-0", "critical", "plain-0: steps", COLORS["plain"]),
        (searcher(results), "critical", f"{searcher(results)}: steps", COLORS["multiverse"]),
        (searcher(results), "tokens", f"{searcher(results)}: all tokens", DEPTH_COLORS[0]),
    ):
        points = {}
        for size, found in _sizes(results[run], "variables").items():
            length = mean_of_right(found, measure)
            if length is not None:
                points[size] = length
        axis.plot(list(points), list(points.values()), "o-", color=color, label=label)
    sizes = list(_sizes(results["multiverse-0"], "variables"))
    axis.set(title="search: length of right answers", xlabel="variables", ylabel="tokens", xticks=sizes)
    from_zero(axis)
    axis.legend(frameon=False, fontsize=8)
