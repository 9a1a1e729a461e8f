"""The git checkout that this code runs from, for what is measured with it."""

from __future__ import annotations

import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def commit_here() -> str | None:
    """Short hash of the commit of this code, with "-dirty" if tracked files differ.

    None where it is no git checkout: an installed package, also inside of another checkout, a copy of the files, or a
    machine without git.
    """
    top = _git("rev-parse", "--show-toplevel")
    if top is None or Path(top).resolve() != ROOT:
        return None
    head = _git("rev-parse", "--short", "HEAD")
    if not head:  # nothing is committed yet
        return None
    return f"{head}-dirty" if _git("status", "--porcelain", "--untracked-files=no") else head


def _git(*arguments: str) -> str | None:
    """What git prints; None if it fails or is not there."""
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None
