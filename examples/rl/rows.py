"""Writes the rows of this example: to train a model that forks at random, and prompts with their right answers, for
reinforcement learning and for measuring it.

The problems are the quickstart's, of two families. A *wide* one has four expressions with sub-expressions, a *narrow*
one a single expression of plain numbers. No prompt asks for either way of thinking. A block always pays for a wide
problem and never for a narrow one: this program counts by how much, before anything is trained.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1] / "quickstart"))
from task import Problem, Split, render_undecided, sample_problem

from megatron_multiverse.cli import parse_options, run_tool
from megatron_multiverse.data.tokenizers import MultiverseTokenizer, build_tokenizer
from megatron_multiverse.structure import measure, parse

FAMILIES: dict[str, dict[str, Any]] = {
    "narrow": {"num_expressions": 1, "max_depth": 1},
    "wide": {"num_expressions": 4, "nested_share": 1.0},
}
TOKENIZER = Path(__file__).parents[1] / "quickstart" / "model"


@dataclass(frozen=True, kw_only=True)
class RowOptions:
    """How many rows, and where they go."""

    output_dir: Path
    """Folder for sft.jsonl (prompt, response), train.jsonl and held_out.jsonl (prompt, answer, family)."""
    sft_rows: int = 10_000
    """Rows to train on first."""
    rl_rows: int = 4_000
    """Prompts to learn from; as many as a twentieth of them are held out."""
    narrow_share: float = 0.8
    """Share of narrow problems among the prompts. They are short: it takes many to make up for a wide one."""
    fork_share: float = 0.5
    """How often the rows of sft.jsonl fork, in either family."""
    seed: int = 0
    """Which problems."""


def draw(rng: random.Random, narrow_share: float, split: Split) -> tuple[str, Problem]:
    """A problem with the name of its family."""
    family = "narrow" if rng.random() < narrow_share else "wide"
    return family, sample_problem(rng, **FAMILIES[family], split=split)


def sft_rows(rng: random.Random, options: RowOptions) -> Iterator[dict[str, Any]]:
    """Prompts with responses, half of them of either family, which fork at random."""
    for _ in range(options.sft_rows):
        _, problem = draw(rng, 0.5, "train")
        prompt, response = render_undecided(problem, fork=rng.random() < options.fork_share)
        yield {"prompt": prompt, "response": response}


def prompts(rng: random.Random, count: int, narrow_share: float, split: Split) -> Iterator[dict[str, Any]]:
    """Prompts with right answers."""
    for _ in range(count):
        family, problem = draw(rng, narrow_share, split)
        yield {"prompt": f"Work out {problem}.", "answer": problem.answer, "family": family}


def write(file: Path, rows: Iterable[dict[str, Any]]) -> None:
    """One row a line."""
    with open(file, "w", encoding="utf-8") as stream:
        stream.writelines(json.dumps(row) + "\n" for row in rows)


class Steps(NamedTuple):
    """Mean decoding steps of right answers to the problems of a family: tokens on the longest chain."""

    sequential: float
    block: float


def count_steps(tokenizer: MultiverseTokenizer, count: int = 100) -> dict[str, Steps]:
    """What either way of thinking takes, by family, from so many problems."""
    rng, steps = random.Random("count"), {}
    for family, shape in FAMILIES.items():
        problems = [sample_problem(rng, **shape) for _ in range(count)]
        ways = ([render_undecided(problem, fork=fork)[1] for problem in problems] for fork in (False, True))
        steps[family] = Steps(*(sum(critical_tokens(text, tokenizer) for text in way) / count for way in ways))
    return steps


def critical_tokens(response: str, tokenizer: MultiverseTokenizer) -> int:
    """Tokens on the longest chain of a response."""
    return measure(parse(tokenizer.tokenize(response), tokenizer.structure_vocab)).critical_tokens


def policies(steps: dict[str, Steps], narrow_share: float) -> dict[str, float]:
    """Mean steps of an answer for a model that forks never, always, half of the time, or where it pays."""
    shares = {"narrow": narrow_share, "wide": 1 - narrow_share}

    def mean(choose: Callable[[Steps], float]) -> float:
        return sum(share * choose(steps[family]) for family, share in shares.items())

    return {
        "never": mean(lambda ways: ways.sequential),
        "always": mean(lambda ways: ways.block),
        "half of the time": mean(lambda ways: sum(ways) / 2),
        "where it pays": mean(min),
    }


def main() -> None:
    options = parse_options(RowOptions)
    folder, rng = options.output_dir, random.Random(f"rl:{options.seed}")
    folder.mkdir(parents=True, exist_ok=True)
    write(folder / "sft.jsonl", sft_rows(rng, options))
    counts: dict[Split, int] = {"train": options.rl_rows, "held_out": options.rl_rows // 20}
    for split, count in counts.items():
        write(folder / f"{split}.jsonl", prompts(rng, count, options.narrow_share, split))
    print(f"wrote {options.sft_rows} rows and {sum(counts.values())} prompts to {folder}")
    steps = count_steps(build_tokenizer("HuggingFaceTokenizer", TOKENIZER))
    for family, ways in steps.items():
        print(f"{family}: {ways.sequential:.0f} steps in sequence, {ways.block:.0f} with a block")
    means = policies(steps, options.narrow_share)
    best = means["where it pays"]
    for name, value in means.items():
        print(f"fork {name}: {value:.0f} steps an answer; forking where it pays is {value / best:.2f} x as fast")


if __name__ == "__main__":
    run_tool(main)
