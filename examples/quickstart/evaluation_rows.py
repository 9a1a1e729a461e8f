"""Writes held-out problems of the quickstart as a task for tools/evaluate.py: columns `problem` and `answer`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from measure import fresh_problems

from megatron_multiverse.cli import parse_options, run_tool


@dataclass(frozen=True, kw_only=True)
class RowOptions:
    """Which problems, and where they go."""

    output: Path
    """JSON Lines file to write."""
    num_problems: int = 100
    """Number of problems."""
    seed: int = 0
    """Which ones."""


def main() -> None:
    options = parse_options(RowOptions)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    with open(options.output, "w", encoding="utf-8") as file:
        for problem in fresh_problems(options.num_problems, seed=options.seed):
            file.write(json.dumps({"problem": f"Work out {problem}.", "answer": problem.answer}) + "\n")
    print(f"wrote {options.num_problems} problems to {options.output}")


if __name__ == "__main__":
    run_tool(main)
