"""Committed results, and how documents write numbers."""

from __future__ import annotations

import json
import re
from decimal import ROUND_HALF_UP, Decimal
from pathlib import Path
from typing import Any

BENCHMARKS = Path(__file__).parents[1]


def results(name: str) -> Any:
    """The content of results: an object, or a list of them where the file has one for each line.

    Args:
        name: below benchmarks/, without suffix.
    """
    file = BENCHMARKS / f"{name}.json"
    if file.is_file():
        return json.loads(file.read_text(encoding="utf-8"))
    return [json.loads(line) for line in file.with_suffix(".jsonl").read_text(encoding="utf-8").splitlines()]


def small_steps(commit: str) -> dict[str, tuple[str, str, str]]:
    """Of text (1x0) and four paths (1x4): milliseconds of a step of a small model, the host's part, and the graph's."""
    runs = results("results/engine_small_steps_h200")["runs"]
    (cases,) = (run["cases"] for run in runs if run["commit"] == commit)
    found: dict[str, tuple[str, str, str]] = {}
    for case in cases:
        tokens = case["case"].replace("1x0", "1").removeprefix("1x")
        (graph,) = (ms for kind, ms in case["graph_ms"].items() if kind.startswith(f"{tokens}/"))
        found[case["case"]] = f"{case['ms_per_step']:.3f}", f"{case['host_ms']:.3f}", f"{graph:.3f}"
    return found


def rounded(value: float, digits: int) -> str:
    """Rounded as one does by hand: results have four digits, and 98.35 as a float is a little less than that."""
    return str(Decimal(str(value)).quantize(Decimal(1).scaleb(-digits), ROUND_HALF_UP))


def short(value: float, digits: int) -> str:
    """3e-5, as documents write it, not 3e-05."""
    return re.sub(r"e-0", "e-", f"{value:.{digits}e}")
