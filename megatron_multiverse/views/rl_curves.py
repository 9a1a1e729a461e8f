"""Curves of reinforcement learning, from the metrics.jsonl of its runs."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megatron_multiverse.errors import ConfigError, DataError
from megatron_multiverse.files import save_figure
from megatron_multiverse.views.loss_curves import (
    RunHistory,
    column,
    marker_of,
    pyplot_for,
    read_histories,
    running_mean,
    whole_steps,
)

PANELS = (
    (("reward", "accuracy"), "mean over the answers of a step"),
    (("critical_length", "length"), "tokens of an answer"),
    (("trigger_ratio", "saved_share"), "share"),
    (("num_parallel",), "tokens / critical tokens"),
    (("entropy",), "nats"),
    (("logprob_drift", "clip_share"), "difference, share"),
)
"""(names of metrics, what they measure) of each panel."""
_FORMER_NAMES = {"acceleration_ratio": "saved_share"}
"""Names in metrics.jsonl of earlier versions, and the present ones."""
_STYLES = ("-", "--", ":", "-.")
_OF_UPDATES = {"entropy", "logprob_drift", "clip_share"}
"""Metrics that only a step with an update has."""


def by_family(name: str, histories: Sequence[RunHistory]) -> list[str]:
    """The metric of each family of prompts, where runs report it by family (`task.family_key`); else the metric."""
    reported = {key for history in histories for record in history.train.values() for key in record}
    return sorted(key for key in reported if key.startswith(f"{name}/")) or [name]


def with_present_names(history: RunHistory) -> RunHistory:
    """The same metrics by their present names. A later version may have continued a run, so each step is looked at."""
    train = {
        step: {_FORMER_NAMES.get(name, name): value for name, value in record.items()}
        for step, record in history.train.items()
    }
    return dataclasses.replace(history, train=train)


def _line(style: str, names: Sequence[str]) -> dict[str, float]:
    """How a curve is drawn: the first of several broad and pale, so that one that runs on it is seen."""
    return {"linewidth": 2.6, "alpha": 0.45} if style == _STYLES[0] and len(names) > 1 else {"linewidth": 1.3}


def _why_empty(panel: Sequence[str], histories: Sequence[RunHistory]) -> str:
    """What a panel without any value says; that no step had an update only where each step says so."""
    records = [record for history in histories for record in history.train.values()]
    if _OF_UPDATES.issuperset(panel) and records and all(record.get("targets") == 0 for record in records):
        return "no value yet: no step had an update\n(all answers to each prompt earned the same)"
    return "not recorded"


def plot_rl(folders: Sequence[Path], output: Path, *, smooth: int = 1) -> None:
    """Draw what answers earned, how long and how parallel they were, and how the updates went, run by run.

    Args:
        folders: run folders; each has a colour.
        output: picture to write.
        smooth: running mean over so many steps.

    Raises:
        ConfigError: `smooth` is below 1, a run is named twice, or no format ends the name of `output`.
        DataError: a run has no readable metrics, or is none of reinforcement learning.
    """
    if smooth < 1:
        raise ConfigError(f"smooth is {smooth}, but a running mean needs at least 1 step (1 draws them as they are)")
    plt = pyplot_for(output)
    histories = [with_present_names(history) for history in read_histories(folders)]
    for folder, history in zip(folders, histories, strict=True):
        if history.train and not any("reward" in record for record in history.train.values()):
            raise DataError(
                f"{folder} is no run of reinforcement learning (no reward): tools/plot_loss.py draws its loss"
            )
    figure, axes = plt.subplots(2, 3, sharex=True, figsize=(13, 6.5), layout="constrained")
    for axis, (panel, unit) in zip(axes.flat, PANELS, strict=True):
        names = [name for known in panel for name in by_family(known, histories)]
        for number, history in enumerate(histories):
            steps = sorted(history.train)
            for name, style in zip(names, itertools.cycle(_STYLES), strict=False):
                curve = running_mean(column(history.train, name), smooth)
                axis.plot(steps, curve, style, color=f"C{number}", marker=marker_of(steps), **_line(style, names))
        for name, style in zip(names, itertools.cycle(_STYLES), strict=False):
            axis.plot([], [], style, color="black", label=name.replace("_", " "), **_line(style, names))
        if all(np.isnan(line.get_ydata()).all() for line in axis.get_lines()):
            note = _why_empty(panel, histories)
            axis.text(0.5, 0.5, note, transform=axis.transAxes, ha="center", va="center", color="0.4", fontsize=9)
            axis.set_yticks([])
        axis.set_ylabel(unit)
        axis.grid(alpha=0.3)
        axis.legend(frameon=False, fontsize=8)
    for axis in axes[1]:
        axis.set_xlabel("step")
        whole_steps(axis)
    if len(histories) > 1:
        lines = [plt.Line2D([], [], color=f"C{number}", label=run.name) for number, run in enumerate(histories)]
        figure.legend(handles=lines, loc="outside upper center", ncols=min(6, len(lines)), frameon=False)
    save_figure(figure, output, dpi=110)
