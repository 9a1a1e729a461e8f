"""The quickstart's figures: printed as tables and kept as JSON."""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Any


def write_report(report: dict[str, Any], path: Path) -> None:
    """Write the figures, with what they were measured on."""
    import torch

    machine = {"machine": platform.machine(), "torch": torch.__version__, "threads": torch.get_num_threads()}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report | {"measured_on": machine}, indent=2) + "\n", encoding="utf-8")


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
    difference, rows_compared = report["max_abs_logit_difference"], report["logit_rows_compared"]
    print(f"decode logits against one forward pass, {rows_compared:>5} rows  {difference:.1e} at most")
    count = report["beyond_training_problems"]
    print(
        f"5 to 6 expressions (trained: 2 to 4), {count} problems    {report['accuracy_5_to_6_expressions']:.0%} right"
    )
    print(f"nesting depth 3 (trained: 1 to 2), {count} problems       {report['accuracy_depth_3']:.0%} right")


def _by_mode(name: str) -> tuple[str, str, str]:
    return f"{name}_parallel", f"{name}_sequential", f"{name}_autoregressive"
