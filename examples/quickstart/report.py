"""The quickstart's figures: printed as tables and kept as JSON."""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Any

MAX_LOGIT_DIFFERENCE = 1e-3
"""Far above what rounding in float32 gives (2e-5), far below what a wrong mask or position does."""
LARGER = {
    "accuracy_6_expressions": "6 expressions",
    "accuracy_8_expressions": "8 expressions",
    "accuracy_depth_3": "2 or 3 expressions of depth 3",
}
"""The kinds of larger problems."""


def write_report(report: dict[str, Any], path: Path) -> None:
    """Write the figures, with what they were measured on."""
    import torch

    machine = {"machine": platform.machine(), "torch": torch.__version__, "threads": torch.get_num_threads()}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report | {"measured_on": machine}, indent=2) + "\n", encoding="utf-8")


def shortfalls(report: dict[str, Any], *, least_accuracy: float = 0.98, least_larger: float = 0.75) -> list[str]:
    """What is wrong with the figures of a run, in words; empty if all is well.

    Args:
        report: the figures; those of the training run may be missing.
        least_accuracy: share of right answers asked for. With few problems one wrong answer may miss it;
            model/README.md has the share of 1,000.
        least_larger: the same for each kind of larger problems. Two of eight may be wrong: a model that is right in
            95 % of a kind passes in 99.4 % of runs, one that is right in half of them in 14 %.
    """
    found = []
    if not report["parallel_equals_sequential"]:
        found.append("answers in parallel and one branch at a time differ")
    for name in ("accuracy", "accuracy_sequential", "accuracy_autoregressive"):
        if not report[name] >= least_accuracy:
            found.append(f"{name} is {report[name]:.3f}, at least {least_accuracy} is expected")
    for name, kind in LARGER.items():
        if not report[name] >= least_larger:
            share = f"{report[name]:.0%} of problems with {kind} are right"
            found.append(f"{share}, at least {least_larger:.0%} is expected")
    if not report["max_abs_logit_difference"] < MAX_LOGIT_DIFFERENCE:
        difference = report["max_abs_logit_difference"]
        found.append(f"decode logits differ from one forward pass by {difference:.1e}, allowed: {MAX_LOGIT_DIFFERENCE}")
    if not report.get("resume_bit_exact", True):
        found.append("the resumed training run differs from the one that was not interrupted")
    if "loss_last" in report and not report["loss_last"] < report["loss_first"]:
        found.append(f"the training loss did not fall: {report['loss_first']:.3f} -> {report['loss_last']:.3f}")
    return found


def print_modes(report: dict[str, Any]) -> None:
    """The three ways of decoding side by side, then the figures that compare them."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{report['num_problems']} fresh problems, greedy decoding")
    for column in ("", "in parallel", "one branch at a time", "without blocks"):
        table.add_column(column, justify="left" if not column else "right")
    rows = (
        ("right answers", "{:.1%}", ("accuracy", "accuracy_sequential", "accuracy_autoregressive")),
        ("tokens per answer", "{:.0f}", _by_mode("tokens_per_answer")),
        ("decode steps per answer", "{:.0f}", _by_mode("decode_steps_per_answer")),
        ("seconds per answer, alone", "{:.2f}", _by_mode("seconds_per_answer")),
    )
    for name, form, keys in rows:
        table.add_row(name, *(form.format(report[key]) for key in keys))
    Console().print(table)
    same = "yes" if report["parallel_equals_sequential"] else "NO"
    print(f"same tokens in parallel and one branch at a time    {same}")
    print(f"num_parallel (tokens / longest chain)               {report['num_parallel']:.2f}")
    for rival, suffix in (("one branch at a time", ""), ("without blocks", "_over_autoregressive")):
        steps, clock = (report[f"net_speedup_{unit}{suffix}"] for unit in ("steps", "wall_clock"))
        print(f"net speedup over {rival:<34} {steps:.2f} x in steps, {clock:.2f} x in wall clock")


def print_checks(report: dict[str, Any]) -> None:
    """How far logits lie from one forward pass, and how many of the larger problems are right."""
    difference, rows_compared = report["max_abs_logit_difference"], report["logit_rows_compared"]
    print(f"decode logits against one forward pass, {rows_compared:>5} rows  {difference:.1e} at most")
    for name, kind in LARGER.items():
        title = f"{report['larger_problems']} problems with {kind}"
        print(f"{title:<51} {report[name]:.0%} right")


def _by_mode(name: str) -> tuple[str, str, str]:
    return f"{name}_parallel", f"{name}_sequential", f"{name}_autoregressive"
