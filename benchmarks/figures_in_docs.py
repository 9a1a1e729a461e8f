"""The figures that README.md, docs/*.md and the quickstart quote, worded anew from the committed results.

    python -m benchmarks.figures_in_docs

names each statement that its document does not make in these words, and ends with status 1; a test does the same. After
new results, copy the new words. Each function in quoted/ belongs to one document. Tables that are quoted whole are made
row by row. The tables of examples/paper_in_miniature come from its own paper_report.py.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from benchmarks.quoted import engine, examples, others, serving, training
from megatron_multiverse.cli import run_tool

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"\]\([./]*(benchmarks/[\w/.]*results/[\w.]+)\.(?:json|jsonl|md)\)")
ONLY_LINKED = {
    ("docs/data.md", "benchmarks/results/preprocess_cpu"),
    ("docs/engine.md", "benchmarks/results/host_step_cpu"),
}
"""Documents, and results that they name without quoting a figure."""
STATEMENTS: dict[str, Callable[[], Iterator[str]]] = {
    "README.md": others.readme,
    "docs/checkpoints.md": others.checkpoints,
    "docs/curation.md": others.curation,
    "docs/engine.md": engine.engine,
    "docs/evaluation.md": examples.evaluation,
    "docs/layers.md": engine.layers,
    "docs/rl.md": examples.rl,
    "docs/serving.md": serving.serving,
    "docs/training.md": training.training,
    "examples/paper_in_miniature/README.md": examples.miniature,
    "examples/quickstart/README.md": examples.quickstart,
    "examples/quickstart/model/README.md": examples.quickstart_model,
}


def missing(document: str, text: str) -> list[str]:
    """The statements from results that a document does not make; line breaks do not count.

    Args:
        document: a key of `STATEMENTS`.
        text: its content.
    """
    said = " ".join(text.split())
    return [statement for statement in STATEMENTS[document]() if " ".join(statement.split()) not in said]


def main() -> None:
    """Name what is missing."""
    lines = [f"{name}: {line}" for name in STATEMENTS for line in missing(name, (ROOT / name).read_text("utf-8"))]
    print("\n".join(lines))
    sys.exit("documents differ from the committed results: copy the lines above, or see why" if lines else 0)


if __name__ == "__main__":
    run_tool(main)
