"""What a model writes behind the blocks that it has closed, by how many levels of blocks each of them had.

    .venv/bin/python examples/paper_in_miniature/closings.py --run back-links-0 --output closings.json

Behind a block in a path stands the verdict of that path, behind the outermost block the end of the thought. No training
row closes more than `MOST_VARIABLES` levels, and behind the last of so many every one of them ends: where the end is
told by that number, an answer of one level more ends in the midst of its tree.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_multiverse.structure import Tag

LABEL = re.compile(r"([\d.]+): (.*)")
LARGEST = 8
"""Variables of a search, by which an answer may have some 14,000 tokens."""


@dataclass(frozen=True, kw_only=True)
class ClosingsOptions:
    """Whose answers are read."""

    run: str
    """As in settings.py."""
    output: Path
    """JSON file for what is found."""
    model: Path | None = None
    """Folder of the model; by default the one of the run in runs/paper_in_miniature/models."""
    sets: tuple[str, ...] = ("variables-4", "variables-5")
    """Searches; those of up to 5 variables are the evaluation's, larger ones are drawn in the same way."""
    problems: int = 32
    """The first so many of each set."""


@dataclass(frozen=True)
class Closed:
    """A block that is closed, and what follows it."""

    levels: int
    """Of blocks in it, itself among them."""
    next_line: str


def read_tree(text: str) -> tuple[dict[str, str], dict[str, Closed]]:
    """The paths and the blocks of a tagged search, whole or broken.

    `structure.parse` will not do, tolerant as it can be: it lists a block that the text ends in like one that is
    closed, and forgets one whose header is broken, by which those around it would have a level less.

    Args:
        text: an answer, or its beginning, with each tag on a line of its own.

    Returns:
        The line with which each path begins, without its label, by the label; and the blocks by the label of the path
        they stand in, ``""`` for the outermost one.
    """
    lines = text.splitlines()
    paths: dict[str, str] = {}
    blocks: dict[str, Closed] = {}
    stood_in: list[str] = []
    levels: list[int] = []
    label = ""
    for line, next_line in zip(lines, [*lines[1:], ""], strict=True):
        if line == Tag.PARALLEL.text:
            stood_in.append(label)
            levels.append(0)
        elif line == Tag.END_PARALLEL.text and levels:
            closed, label = levels.pop() + 1, stood_in.pop()
            blocks.setdefault(label, Closed(closed, next_line))
            if levels:
                levels[-1] = max(levels[-1], closed)
        elif (found := LABEL.fullmatch(line)) and ": " in f"{found[2]} ":  # an outline has the case alone
            label = found[1]
            paths.setdefault(label, found[2])
    return paths, blocks


def compare(pairs: Iterable[tuple[str, str]]) -> dict[str, Any]:
    """Right texts beside those written, search by search.

    Args:
        pairs: the right text and the one written, of each problem.

    Returns:
        `paths`: how many of the right ones there are (`of`), and how many are written as they are (`right`);
        `closings`, by levels closed: how many blocks there are (`of`), behind how many stands what is right, behind how
        many of the others the end (`ended`); `wrong`: what stands behind each block that is closed and has not what is
        right behind it, beside what is right there and what is right behind the block of the outermost path around it.
    """
    trials = {"right": 0, "of": 0}
    closings: dict[int, dict[str, int]] = {}
    wrong = []
    for number, (wanted, written) in enumerate(pairs):
        right_paths, right_blocks = read_tree(wanted)
        paths, blocks = read_tree(written)
        trials["of"] += len(right_paths)
        trials["right"] += sum(paths.get(label) == line for label, line in right_paths.items())
        for label, block in right_blocks.items():
            count = closings.setdefault(block.levels, {"of": 0, "right": 0, "ended": 0})
            count["of"] += 1
            found = blocks.get(label)
            if found is None:
                continue
            if found.next_line == block.next_line:
                count["right"] += 1
                continue
            count["ended"] += found.next_line == Tag.END_THINK.text
            outermost = right_blocks[label.partition(".")[0]].next_line
            lines = {"right": block.next_line, "outermost": outermost, "written": found.next_line}
            wrong.append({"problem": number, "path": label, "levels": block.levels} | lines)
    by_levels = {str(levels): closings[levels] for levels in sorted(closings)}
    return {"paths": trials, "closings": by_levels, "wrong": wrong}


def main() -> None:
    import settings
    import torch
    from answers import Answerer, problem_set
    from training_rows import FEWEST_VARIABLES

    from megatron_multiverse.cli import parse_options
    from megatron_multiverse.errors import ConfigError
    from megatron_multiverse.files import write_json_atomic

    options = parse_options(ClosingsOptions)
    rows = settings.runs().get(options.run)
    if rows is None or rows.kind != "multiverse":
        known = [name for name, one in settings.runs().items() if one.kind == "multiverse"]
        raise ConfigError(f"--run {options.run}: known are {', '.join(known)}")
    known = [f"variables-{number}" for number in range(FEWEST_VARIABLES, LARGEST + 1)]
    if unknown := [name for name in options.sets if name not in known]:
        raise ConfigError(f"--sets {unknown}: searches are {', '.join(known)}")
    folder = options.model or Path(__file__).parents[2] / "runs" / "paper_in_miniature" / "models" / options.run
    answerer = Answerer(folder, rows.kind, settings.FULL)
    started, found = time.monotonic(), {}
    for name in options.sets:
        problems = problem_set(name, options.problems, rows)
        results, _ = answerer.answer(problems, "parallel")
        written = [answerer.tokenizer.detokenize(result.token_ids) for result in results]
        right = [int(answerer.is_right(*pair)) for pair in zip(problems, results, strict=True)]
        wanted = [problem.response("tagged") for problem in problems]
        found[name] = {"right": right, **compare(zip(wanted, written, strict=True))}
        if 0 in right:
            found[name]["first_wrong"] = answerer.where_wrong(problems[right.index(0)], results[right.index(0)])
        print(f"{options.run} {name}: {sum(right)} of {len(right)} right; {found[name]['closings']}", flush=True)
    report = {
        "run": options.run,
        **settings.measured_on(),
        "cpu_threads": None if torch.cuda.is_available() else torch.get_num_threads(),
        "seconds": round(time.monotonic() - started, 1),
        "sets": found,
    }
    write_json_atomic(options.output, report, indent=1)


if __name__ == "__main__":
    from megatron_multiverse.cli import run_tool

    run_tool(main)
