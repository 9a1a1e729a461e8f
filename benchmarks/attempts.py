"""Which parts of a benchmark were begun, so that one that ends all ranks does not take the others with it.

A rank that runs out of memory cannot be waited for: the others hang in a collective with it, and their communicators
are of no use afterwards. So all processes end, torchrun starts them again (`--max-restarts`), and what was begun and
not ended before is known to have failed.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from megatron_multiverse.files import write_json_atomic
from megatron_multiverse.parallel.ranks import Ranks

OUT_OF_MEMORY = "out of memory"
BROKE_OFF = "broke off"
"""What became of a part whose processes ended for another reason."""


class Attempts:
    """What earlier processes of this run of torchrun began. All methods are collective.

    Args:
        ranks: all of them, on one host.
        folder: where it is noted; a run of torchrun finds its own notes by its id.
    """

    def __init__(self, ranks: Ranks, folder: Path | None = None) -> None:
        run = os.environ.get("TORCHELASTIC_RUN_ID", f"process-{os.getpid()}")
        self._ranks = ranks
        self._file = (folder or Path(tempfile.gettempdir())) / f"multiverse_benchmark_{run}.json"
        self._no_memory = self._file.with_suffix(".no_memory")
        self._notes: dict[str, Any] = ranks.first(self._read)

    def _read(self) -> dict[str, Any]:
        notes: dict[str, Any] = {"begun": None, "ended": {}}
        if self._file.exists():
            notes = json.loads(self._file.read_text(encoding="utf-8"))
        if (name := notes["begun"]) is not None:
            notes = {"begun": None, "ended": notes["ended"] | {name: self._reason()}}
            write_json_atomic(self._file, notes)
        return notes

    def _reason(self) -> str:
        if not self._no_memory.exists():
            return BROKE_OFF
        self._no_memory.unlink()
        return OUT_OF_MEMORY

    def outcome(self, name: str) -> Any:
        """What an earlier process left of a part: what it noted at its end, `OUT_OF_MEMORY`, `BROKE_OFF`, or None if
        it was not begun."""
        return self._notes["ended"].get(name)

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[dict[str, Any]]:
        """Note that a part is begun, and at the end of the block that it is done, with what the block puts into the
        dictionary. An error in it ends this process and the other ranks'."""
        noted: dict[str, Any] = {}
        self._write(name)
        try:
            yield noted
        except torch.cuda.OutOfMemoryError:
            self._no_memory.touch()
            raise
        self._notes["ended"][name] = noted
        self._write(None)

    def _write(self, begun: str | None) -> None:
        notes = self._notes | {"begun": begun}
        self._ranks.first(lambda: write_json_atomic(self._file, notes))

    def forget(self) -> None:
        """Everything is done: nothing is left of the notes."""
        self._ranks.first(lambda: self._file.unlink(missing_ok=True))
