"""Writes rows of the quickstart's task as JSON lines with the keys `prompt` and `response`.

The same options give the same rows in the same order, whatever the number of workers.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from task import Problem, Split, render_autoregressive, render_parallel, sample_problem

CHUNK_ROWS = 2000


@dataclass(frozen=True, kw_only=True)
class GenerateOptions:
    """Which rows to draw and where they go."""

    output: Path
    """JSONL file to write."""
    num_rows: int = 100_000
    """Number of rows."""
    seed: int = 0
    """Seed of the whole file."""
    autoregressive_share: float = 0.25
    """Share of rows that work the problem in sequence, without blocks."""
    min_expressions: int = 2
    """Fewest expressions in a problem."""
    max_expressions: int = 4
    """Most expressions in a problem."""
    max_depth: int = 2
    """1 = no sub-expressions, 2 = sub-expressions, 3 = sub-expressions of sub-expressions."""
    nested_share: float = 0.25
    """Probability that an expression has sub-expressions."""
    exact_depth: bool = False
    """Only problems whose deepest expression has max_depth."""
    split: Split = "train"
    """Split to draw from; the splits never share a problem."""
    workers: int = 0
    """Processes. 0 means one per core for a large file, and only this one for a small file."""

    def __post_init__(self) -> None:
        if self.num_rows < 1 or not 1 <= self.min_expressions <= self.max_expressions:
            raise ValueError(
                f"need num_rows >= 1 and 1 <= min_expressions <= max_expressions, got {self.num_rows=}, "
                f"min_expressions={self.min_expressions}, max_expressions={self.max_expressions}"
            )
        if not 0 <= self.autoregressive_share <= 1:
            raise ValueError(f"autoregressive_share must lie in [0, 1], got {self.autoregressive_share}")


def sample_problems(options: GenerateOptions, num_problems: int, *, seed: str) -> Iterator[tuple[Problem, bool]]:
    """Problems as the options say, each with whether it is to be worked in sequence."""
    rng = random.Random(seed)
    for _ in range(num_problems):
        problem = sample_problem(
            rng,
            num_expressions=rng.randint(options.min_expressions, options.max_expressions),
            max_depth=options.max_depth,
            nested_share=options.nested_share,
            exact_depth=options.exact_depth,
            split=options.split,
        )
        yield problem, rng.random() < options.autoregressive_share


def generate(options: GenerateOptions) -> int:
    """Write the rows; returns the number of bytes written."""
    starts = range(0, options.num_rows, CHUNK_ROWS)
    jobs = [(options, chunk, min(CHUNK_ROWS, options.num_rows - start)) for chunk, start in enumerate(starts)]
    workers = options.workers or (1 if len(jobs) < 4 else os.cpu_count() or 1)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    written = 0
    with options.output.open("wb") as file:
        if workers == 1:
            for job in jobs:
                written += file.write(_chunk_text(job))
        else:
            with multiprocessing.Pool(workers) as pool:
                for text in pool.imap(_chunk_text, jobs):
                    written += file.write(text)
    return written


def _chunk_text(job: tuple[GenerateOptions, int, int]) -> bytes:
    options, chunk, num_rows = job
    lines = []
    for problem, in_sequence in sample_problems(options, num_rows, seed=f"{options.seed}:{chunk}"):
        prompt, response = render_autoregressive(problem) if in_sequence else render_parallel(problem)
        lines.append(json.dumps({"prompt": prompt, "response": response}) + "\n")
    return "".join(lines).encode()


def main() -> None:
    import time

    from megatron_multiverse.cli import parse_options

    options = parse_options(GenerateOptions)
    start = time.perf_counter()
    written = generate(options)
    rate = options.num_rows / (time.perf_counter() - start)
    print(f"{options.output}: {options.num_rows} rows, {written / 1e6:.1f} MB, {rate:,.0f} rows/s")


if __name__ == "__main__":
    from megatron_multiverse.cli import run_tool

    run_tool(main)
