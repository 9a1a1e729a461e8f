"""The commit of what is measured: of this code, and of nothing else."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from megatron_multiverse import checkout

ROOT = Path(__file__).parents[2]


def git(folder: Path, *words: str) -> str:
    identity = ["-c", "user.name=x", "-c", "user.email=x@example.org"]
    done = subprocess.run(["git", "-C", str(folder), *identity, *words], check=True, capture_output=True, text=True)
    return done.stdout.strip()


def test_the_commit_is_told_and_whether_files_differ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkout, "ROOT", tmp_path.resolve())
    assert checkout.commit_here() is None, "a folder of files"
    git(tmp_path, "init", "-q")
    assert checkout.commit_here() is None, "nothing is committed"
    (tmp_path / "file").write_text("a")
    git(tmp_path, "add", "file")
    git(tmp_path, "commit", "-q", "-m", "one")
    head = git(tmp_path, "rev-parse", "--short", "HEAD")
    (tmp_path / "result").write_text("not tracked")
    assert checkout.commit_here() == head
    (tmp_path / "file").write_text("b")
    assert checkout.commit_here() == f"{head}-dirty"


def test_the_commit_of_another_checkout_around_the_package_is_not_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    git(tmp_path, "init", "-q")
    git(tmp_path, "commit", "-q", "--allow-empty", "-m", "one")
    (tmp_path / "site-packages").mkdir()
    monkeypatch.setattr(checkout, "ROOT", tmp_path.resolve() / "site-packages")
    assert checkout.commit_here() is None


def test_a_machine_without_git(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert checkout.commit_here() is None


def test_nobody_else_asks_git_for_the_commit() -> None:
    files = [file for folder in ("benchmarks", "examples", "tools", "megatron_multiverse") for file in
             (ROOT / folder).rglob("*.py")]  # fmt: skip
    asking = [file.name for file in files if re.search(r"[\"' ]rev-parse", file.read_text(encoding="utf-8"))]
    assert asking == ["checkout.py"]
