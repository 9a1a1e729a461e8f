"""Runs many cases of tests/unit/inference/test_fuzz.py at the same time, and counts what they prove.

    python tools/dev/fuzz.py --processes 8 --portions 0:40 --output runs/fuzz.json

It needs nothing but pytest, hypothesis and what the engine needs. Failed cases are printed with their seeds.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).parents[2]
FILE = "tests/unit/inference/test_fuzz.py"
TREES, SOUP = "test_random_trees_equal_one_forward", "test_whatever_is_written_ends_and_changes_no_neighbour"
TREES_PER_SEED = ENGINES_PER_CASE = 2
AT_ONCE = 2
"""Portions of one process: few, so that all processes end at about the same time."""


@dataclass(frozen=True, kw_only=True)
class FuzzOptions:
    """Which cases run, and on how many processes."""

    portions: str = "0:20"
    """FIRST:END as MULTIVERSE_FUZZ takes it: three seeds of trees and eight of tag soup each."""
    processes: int = 2
    """Processes at the same time, one thread each."""
    seconds: float = 3600
    """No process starts after this time."""
    output: Path | None = None
    """JSON with the counts."""
    commit: str | None = None
    """What the counts are of; by default git is asked."""


@dataclass(frozen=True)
class Case:
    """One test of the file."""

    test: str
    seed: int
    passed: bool
    name: str


def run_portions(first: int, end: int, folder: Path) -> tuple[list[Case], str]:
    """The cases of these portions, and what pytest printed where one failed."""
    report = folder / f"{first}.xml"
    tests = [f"{FILE}::{name}" for name in (TREES, SOUP)]
    # Without the options of pyproject.toml, some of which need plugins.
    options = ["-q", "-o", "addopts=", "-p", "no:cacheprovider", "--tb=short", f"--junitxml={report}"]
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *tests],
        cwd=ROOT, env=os.environ | {"MULTIVERSE_FUZZ": f"{first}:{end}", "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    cases = []
    for found in ElementTree.parse(report).iter("testcase") if report.exists() else ():
        test, _, parameters = found.attrib["name"].partition("[")
        seed = int(parameters.rstrip("]").rpartition("-")[2])
        cases.append(Case(test, seed, not len(found.findall("failure") + found.findall("error")), found.attrib["name"]))
    return cases, "" if ran.returncode == 0 else (ran.stdout + ran.stderr)[-3000:]


def counts(cases: list[Case]) -> dict[str, object]:
    """What the cases prove: each seed of trees has two different ones, each case two engines."""
    trees, soup = ([case for case in cases if case.test == test] for test in (TREES, SOUP))
    distinct = len({case.seed for case in trees if case.passed}) * TREES_PER_SEED
    return {
        "distinct_trees": distinct,
        "tree_cases": len(trees),
        "tree_engines": ENGINES_PER_CASE * len(trees),
        "soup_seeds": len({case.seed for case in soup}),
        "soup_cases": len(soup),
        "soup_engines": ENGINES_PER_CASE * len(soup),
        "failed": [case.name for case in cases if not case.passed],
    }


def main() -> None:
    from megatron_multiverse.checkout import commit_here
    from megatron_multiverse.cli import parse_options

    options = parse_options(FuzzOptions)
    first, end = map(int, options.portions.split(":"))
    started, cases, broken = time.monotonic(), [], 0
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(options.processes) as pool:

        def work(begin: int) -> tuple[list[Case], str] | None:
            if time.monotonic() - started > options.seconds:
                return None
            return run_portions(begin, min(begin + AT_ONCE, end), Path(folder))

        for done in as_completed([pool.submit(work, begin) for begin in range(first, end, AT_ONCE)]):
            if (got := done.result()) is not None:
                cases += got[0]
                if got[1]:
                    broken += 1
                    print(got[1], flush=True)
    summary = {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "commit": options.commit or commit_here() or "",
        "python": sys.version.split()[0],
        "portions": options.portions,
        "seconds": round(time.monotonic() - started, 1),
        **counts(cases),
    }
    print(json.dumps(summary, indent=2))
    if options.output is not None:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(summary, indent=2) + "\n")
    if broken:
        sys.exit(f"error: {broken} processes had failures")


if __name__ == "__main__":
    from megatron_multiverse.cli import run_tool

    run_tool(main)
