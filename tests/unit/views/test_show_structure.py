"""tools/show_structure.py as a user calls it."""

from __future__ import annotations

import subprocess
from pathlib import Path

from tests.forked import run_forked

ROOT = Path(__file__).parents[3]


def show(*arguments: str, text: str = "") -> subprocess.CompletedProcess[str]:
    return run_forked(ROOT / "tools" / "show_structure.py", *arguments, cwd=ROOT, text=text)


def test_draws_the_example_and_prints_its_statistics(tmp_path: Path) -> None:
    done = show("--input", "docs/images/example.txt", "--output-dir", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"visibility.png", "positions.png", "timeline.png"}
    printed = dict(line.split(maxsplit=1) for line in done.stdout.splitlines())
    assert printed["paths"] == "4" and printed["depth"] == "2" and printed["num_tokens"] == "113"


def test_broken_text_is_drawn_as_plain_text_or_refused(tmp_path: Path) -> None:
    broken = "<Parallel>\n<Goal>\n</Goal>\n"
    done = show("--input", "-", "--output-dir", str(tmp_path), text=broken)
    assert done.returncode == 0 and "malformed        no_outline (1)" in done.stdout
    refused = show("--input", "-", "--output-dir", str(tmp_path), "--strict", text=broken)
    assert refused.returncode == 1 and "expected at least one <Outline>" in refused.stderr
