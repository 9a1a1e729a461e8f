"""Curves from metrics.jsonl. A resumed run is one curve: where a step was done twice, the second time counts."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_multiverse.checkpoints.run_files import METRICS_FILE
from megatron_multiverse.errors import ConfigError, DataError
from megatron_multiverse.files import save_figure

logger = logging.getLogger(__name__)

_FEW = 30


@dataclass(frozen=True)
class RunHistory:
    """What happened in one run folder, by step."""

    name: str
    train: dict[int, dict[str, Any]]
    valid: dict[int, dict[str, Any]]
    resumes: list[int]
    """Steps at which the run was continued from a checkpoint."""


def read_history(folder: Path) -> RunHistory:
    """Read a run's metrics.jsonl. Lines that a crash has damaged are passed over with a warning.

    Raises:
        DataError: the file is missing or holds no training steps.
    """
    path = folder / METRICS_FILE
    if not path.is_file():
        raise DataError(f"{path} does not exist: name the folder given as checkpoint.save")
    train: dict[int, dict[str, Any]] = {}
    valid: dict[int, dict[str, Any]] = {}
    resumes = []
    for record in _records(path):
        kind, step = record["kind"], record["step"]
        if kind == "start":
            resumes += [step] if record.get("resumed") else []
            # a crash may lie between the checkpoint and the last line: those steps are done again
            train, valid = ({s: r for s, r in kept.items() if s <= step} for kept in (train, valid))
        elif kind in ("train", "valid"):
            (train if kind == "train" else valid)[step] = record
    if not train:
        raise DataError(f"{path} holds no training steps yet")
    whole = Path(os.path.abspath(folder))  # "." has no name
    return RunHistory(whole.name if whole.name != "checkpoints" else whole.parent.name, train, valid, resumes)


def read_histories(folders: Sequence[Path]) -> list[RunHistory]:
    """The runs of a picture. Those whose folders have one name (`a/run` and `b/run`) are told apart by where they lie.

    Raises:
        ConfigError: a folder is named twice.
        DataError: see `read_history`.
    """
    histories = [read_history(folder) for folder in folders]
    places = [Path(os.path.abspath(folder)) for folder in folders]
    if repeated := next((place for place in places if places.count(place) > 1), None):
        raise ConfigError(f"--runs names {repeated} twice: name each run once")
    names = [history.name for history in histories]
    depth = 1
    while len(set(names)) < len(names):
        depth += 1
        names = [
            str(Path(*place.parts[-depth:])) if names.count(name) > 1 else name
            for place, name in zip(places, names, strict=True)
        ]
    return [dataclasses.replace(history, name=name) for history, name in zip(histories, names, strict=True)]


def _records(path: Path) -> list[dict[str, Any]]:
    """The whole records of a metrics.jsonl: objects with kind and step."""
    records, damaged = [], []
    with path.open(encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                record = json.loads(line)
            except ValueError:
                record = None
            if isinstance(record, dict) and isinstance(record.get("step"), int) and "kind" in record:
                records.append(record)
            else:
                damaged.append(number)
    if damaged:
        shown = ", ".join(map(str, damaged[:5])) + (", ..." if len(damaged) > 5 else "")
        logger.warning("%s: %d damaged lines are passed over (line %s)", path, len(damaged), shown)
    return records


def running_mean(values: Sequence[float], window: int) -> np.ndarray:
    """Mean of each value and up to window - 1 before it, NaN left out; NaN where there is no other."""
    numbers = np.asarray(values, dtype=np.float64)
    is_number = ~np.isnan(numbers)
    sums = np.cumsum(np.concatenate(([0.0], np.where(is_number, numbers, 0.0))))
    counts = np.cumsum(np.concatenate(([0], is_number)))
    ends = np.arange(1, len(numbers) + 1)
    starts = np.maximum(0, ends - window)
    count = counts[ends] - counts[starts]
    means: np.ndarray = np.where(count, sums[ends] - sums[starts], np.nan) / np.maximum(count, 1)
    return means


def column(records: dict[int, dict[str, Any]], name: str) -> list[float]:
    """One number of each record in the order of steps, NaN where it is missing or was not finite."""
    values = (records[step].get(name) for step in sorted(records))
    return [float(value) if isinstance(value, (int, float)) else np.nan for value in values]


def marker_of(steps: Sequence[int]) -> str | None:
    """A dot for each step where they are few: a value between two that are missing is no line."""
    return "." if len(steps) <= _FEW else None


def whole_steps(axis: Any) -> None:
    """Ticks at whole steps, also where few have been made."""
    from matplotlib.ticker import MaxNLocator

    axis.xaxis.set_major_locator(MaxNLocator(integer=True))


def pyplot_for(output: Path) -> Any:
    """matplotlib's pyplot, without a screen.

    Raises:
        ConfigError: the name of `output` says no format that can be drawn.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.backend_bases import FigureCanvasBase

    formats = FigureCanvasBase.get_supported_filetypes()
    if output.suffix.lower().lstrip(".") not in formats:
        raise ConfigError(f"cannot draw {output}: end its name in .{', .'.join(sorted(formats))}")
    return plt


def plot_loss(folders: Sequence[Path], output: Path, *, smooth: int = 1, log_scale: bool = False) -> None:
    """Draw loss (top) and learning rate (bottom) of the runs, the loss as a running mean over `smooth` lines.

    Raises:
        ConfigError: `smooth` is below 1, a run is named twice, or no format ends the name of `output`.
        DataError: a run has no readable metrics, or is one of reinforcement learning.
    """
    if smooth < 1:
        raise ConfigError(
            f"smooth is {smooth}, but a running mean needs at least 1 line (1 draws the losses as they are)"
        )
    plt = pyplot_for(output)
    histories = read_histories(folders)
    for folder, history in zip(folders, histories, strict=True):
        if any("reward" in record for record in history.train.values()):
            raise DataError(
                f"{folder} is a run of reinforcement learning, whose loss is none per trained token: tools/plot_rl.py "
                "draws its curves"
            )
    figure, (top, bottom) = plt.subplots(2, 1, sharex=True, figsize=(9, 6), height_ratios=[3, 1], layout="constrained")
    for number, history in enumerate(histories):
        color, steps = f"C{number}", sorted(history.train)
        curve = running_mean(column(history.train, "loss"), smooth)
        top.plot(steps, curve, color=color, linewidth=1.2, marker=marker_of(steps), label=history.name)
        if history.valid:
            at = sorted(history.valid)
            top.plot(
                at, column(history.valid, "loss"),
                "o", color=color, markeredgecolor="black", markersize=5, label=f"{history.name}, validation",
            )  # fmt: skip
        for index, step in enumerate(history.resumes):
            label = f"{history.name}, resumed" if index == 0 else None
            top.axvline(step, color=color, linestyle=":", linewidth=1, label=label)
        bottom.plot(steps, column(history.train, "lr"), color=color, linewidth=1.2, marker=marker_of(steps))
    top.set_ylabel("loss per trained token")
    if log_scale:
        top.set_yscale("log")
    top.grid(alpha=0.3)
    top.legend(frameon=False)
    bottom.set_ylabel("learning rate")
    bottom.set_xlabel("step")
    whole_steps(bottom)
    bottom.set_ylim(bottom=0)
    bottom.grid(alpha=0.3)
    save_figure(figure, output, dpi=150)
