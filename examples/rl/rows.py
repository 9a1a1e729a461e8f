"""Writes the rows of this example: to train a model that forks now and then, whether it pays or not, and prompts with
their right answers, for reinforcement learning and for measuring it.

The problems are the quickstart's, of one to four expressions. No prompt asks for either way of thinking. Forking pays
for three or four expressions, depends on the lengths of two, and never pays for one, nor for the two sides of a
sub-expression.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "quickstart"))
from task import Problem, Split, render_undecided, sample_problem

from megatron_multiverse.cli import parse_options, run_tool


@dataclass(frozen=True, kw_only=True)
class RowOptions:
    """How many rows, and where they go."""

    output_dir: Path
    """Folder for sft.jsonl (prompt, response), train.jsonl and held_out.jsonl (prompt, answer, expressions)."""
    sft_rows: int = 20_000
    """Rows to train on first."""
    rl_rows: int = 4_000
    """Prompts to learn from; as many as a twentieth of them are held out."""
    fork_share: float = 0.3
    """How often the rows of sft.jsonl fork where they could."""
    seed: int = 0
    """Which problems."""


def draw(rng: random.Random, split: Split) -> Problem:
    """A problem of one to four expressions, half of them with sub-expressions."""
    return sample_problem(rng, num_expressions=rng.randint(1, 4), nested_share=0.5, split=split)


def asked(problem: Problem) -> dict[str, Any]:
    """A prompt with its right answer."""
    return {"prompt": f"Work out {problem}.", "answer": problem.answer, "expressions": len(problem.expressions)}


def write(file: Path, rows: Iterable[dict[str, Any]]) -> None:
    """One row a line."""
    with open(file, "w", encoding="utf-8") as stream:
        stream.writelines(json.dumps(row) + "\n" for row in rows)


def main() -> None:
    options = parse_options(RowOptions)
    folder, rng = options.output_dir, random.Random(f"rl:{options.seed}")
    folder.mkdir(parents=True, exist_ok=True)
    rendered = (
        render_undecided(draw(rng, "train"), rng, fork_share=options.fork_share) for _ in range(options.sft_rows)
    )
    write(folder / "sft.jsonl", ({"prompt": prompt, "response": response} for prompt, response in rendered))
    write(folder / "train.jsonl", (asked(draw(rng, "train")) for _ in range(options.rl_rows)))
    write(folder / "held_out.jsonl", (asked(draw(rng, "held_out")) for _ in range(options.rl_rows // 20)))
    print(f"wrote {options.sft_rows} rows and {options.rl_rows + options.rl_rows // 20} prompts to {folder}")


if __name__ == "__main__":
    run_tool(main)
