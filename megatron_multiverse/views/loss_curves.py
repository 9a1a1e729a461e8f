"""Curves from metrics.jsonl. A resumed run is one curve: where a step was done twice, the second time counts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_multiverse.checkpoints.run_files import METRICS_FILE
from megatron_multiverse.errors import DataError


@dataclass(frozen=True)
class RunHistory:
    """What happened in one run folder, by step."""

    name: str
    train: dict[int, dict[str, Any]]
    valid: dict[int, dict[str, Any]]
    resumes: list[int]
    """Steps at which the run was continued from a checkpoint."""


def read_history(folder: Path) -> RunHistory:
    """Read a run's metrics.jsonl.

    Raises:
        DataError: the file is missing or a line in it (other than a half-written last one) is not JSON.
    """
    path = folder / METRICS_FILE
    if not path.is_file():
        raise DataError(f"{path} does not exist: name the folder given as checkpoint.save")
    lines = path.read_text(encoding="utf-8").splitlines()
    train: dict[int, dict[str, Any]] = {}
    valid: dict[int, dict[str, Any]] = {}
    resumes = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            if number == len(lines):  # the run was killed while writing
                break
            raise DataError(f"{path}, line {number}: not JSON ({error})") from None
        step = record["step"]
        if record["kind"] == "start":
            resumes += [step] if record["resumed"] else []
            # a crash may lie between the checkpoint and the last line: those steps are done again
            train, valid = ({s: r for s, r in kept.items() if s <= step} for kept in (train, valid))
        elif record["kind"] in ("train", "valid"):
            (train if record["kind"] == "train" else valid)[step] = record
    if not train:
        raise DataError(f"{path} holds no training steps yet")
    return RunHistory(folder.name if folder.name != "checkpoints" else folder.parent.name, train, valid, resumes)


def running_mean(values: Sequence[float], window: int) -> np.ndarray:
    """Mean of each value and up to window - 1 before it."""
    sums = np.cumsum(np.concatenate(([0.0], values)))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - window)
    means: np.ndarray = (sums[ends] - sums[starts]) / (ends - starts)
    return means


def plot_loss(folders: Sequence[Path], output: Path, *, smooth: int = 1, log_scale: bool = False) -> None:
    """Draw loss (top) and learning rate (bottom) of the runs, the loss as a running mean over `smooth` lines.

    Raises:
        DataError: a run has no readable metrics.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    histories = [read_history(folder) for folder in folders]
    figure, (top, bottom) = plt.subplots(2, 1, sharex=True, figsize=(9, 6), height_ratios=[3, 1], layout="constrained")
    for number, history in enumerate(histories):
        color, steps = f"C{number}", sorted(history.train)
        losses = [np.nan if (y := history.train[s]["loss"]) is None else y for s in steps]
        curve = running_mean(losses, smooth)
        top.plot(steps, curve, color=color, linewidth=1.2, label=history.name)
        if history.valid:
            at = sorted(history.valid)
            top.plot(
                at, [history.valid[s]["loss"] for s in at],
                "o", color=color, markeredgecolor="black", markersize=5, label=f"{history.name}, validation",
            )  # fmt: skip
        for index, step in enumerate(history.resumes):
            label = f"{history.name}, resumed" if index == 0 else None
            top.axvline(step, color=color, linestyle=":", linewidth=1, label=label)
        bottom.plot(steps, [history.train[s]["lr"] for s in steps], color=color, linewidth=1.2)
    top.set_ylabel("loss per trained token")
    if log_scale:
        top.set_yscale("log")
    top.grid(alpha=0.3)
    top.legend(frameon=False)
    bottom.set_ylabel("learning rate")
    bottom.set_xlabel("step")
    bottom.set_ylim(bottom=0)
    bottom.grid(alpha=0.3)
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=150)
    plt.close(figure)
