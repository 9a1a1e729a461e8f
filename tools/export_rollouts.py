"""Rows for other trainers from answer records: rollouts.jsonl of a run, or what tools/generate.py --records wrote.

Example:
    python tools/export_rollouts.py --input runs/rl/run/rollouts.jsonl --output rows.jsonl --rows expanded
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_multiverse.cli import parse_options, run_tool


@dataclass(frozen=True, kw_only=True)
class Options:
    """Write answer records as training rows."""

    input: Path
    """Records, one a line."""
    output: Path
    """JSON Lines to write."""
    rows: Literal["linear", "expanded"] = "linear"
    """linear: one row an answer, with positions and visibility labels, for trainers that take them. expanded: a row
    for each branch, prefix and what it wrote, for stock causal trainers; what comes after a join is left out and
    counted."""


def main() -> None:
    options = parse_options(Options)
    from megatron_multiverse.rl.exports import export_records

    totals = export_records(options.input, options.output, options.rows)
    print(f"wrote {totals.rows} rows of {totals.answers} answers to {options.output}")
    if totals.left_out:
        share = totals.left_out / max(1, totals.drawn)
        print(
            f"left out: {totals.left_out} of {totals.drawn} drawn tokens ({share:.1%}): {totals.reason}",
            file=sys.stderr,
        )


if __name__ == "__main__":
    run_tool(main)
