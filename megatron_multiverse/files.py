"""Small files that are whole or not there: readers see the old or the new content, never half of it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def write_text_atomic(path: str | Path, text: str) -> None:
    """Replace the content of a file; it is on the disk when this returns.

    Args:
        path: the file; its folder must exist.
        text: its new content, written as UTF-8.

    Raises:
        OSError: the file cannot be written; the old content stands.
    """
    path = Path(path)
    # The process id keeps apart processes that write the same file, e.g. a worker that outlives its killed parent.
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        flush(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    flush(path.parent)


def write_json_atomic(path: str | Path, value: Any, *, indent: int | None = 2) -> None:
    """`write_text_atomic` of a JSON value and a final newline."""
    write_text_atomic(path, json.dumps(value, indent=indent) + "\n")


def flush(path: str | Path) -> None:
    """Push a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
