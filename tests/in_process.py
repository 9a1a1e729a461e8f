"""Tools run as their scripts are, in this process: a new interpreter would import torch and megatron-core again."""

from __future__ import annotations

import runpy
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Done:
    """How a tool ended."""

    returncode: int
    stdout: str
    stderr: str


def run_here(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], script: str, *words: str | Path
) -> Done:
    """Run a script, named from the root of the repository, with these arguments."""
    monkeypatch.setattr("sys.argv", [script, *map(str, words)])
    capsys.readouterr()
    code, message = 0, ""
    try:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    except SystemExit as ended:  # its argument is an exit code, or what the interpreter would print before code 1
        code, message = (1, f"{ended.code}\n") if isinstance(ended.code, str) else (int(ended.code or 0), "")
    shown = capsys.readouterr()
    return Done(code, shown.out, shown.err + message)
