"""Notes which units of a conversion are finished: one JSON line each, after a first line that says what is converted.

The files of a unit are flushed to disk before its line is, so a line that can be read vouches for its files.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from types import TracebackType
from typing import Any

from megatron_multiverse.checkpoints.formats.hf_assets import (
    CARD_FILE,
    TEMPLATE_FOLDER,
    TOKENIZER_FILES,
)
from megatron_multiverse.checkpoints.formats.hf_safetensors import INDEX_FILE
from megatron_multiverse.checkpoints.protocols import Record
from megatron_multiverse.checkpoints.run_files import MODEL_CONFIG_FILE, POINTER_FILE, RECORD_FILE
from megatron_multiverse.checksums import CHECKSUMS_FILE, checksum
from megatron_multiverse.data.generation_config import GENERATION_FILE
from megatron_multiverse.errors import CheckpointError
from megatron_multiverse.files import flush, try_lock

MANIFEST_FILE = "conversion_progress.jsonl"
_NAMES = [*TOKENIZER_FILES, GENERATION_FILE, CARD_FILE, INDEX_FILE, "config.json"]
_NAMES += [MODEL_CONFIG_FILE, RECORD_FILE, POINTER_FILE]
OWN_FILES = re.compile(
    r"model(-\d{5}-of-\d{5})?\.safetensors|"
    r"release/(__0_\w+\.distcp|\.metadata|metadata\.json|common\.pt|mp_rank_\d\d(_\d{3})?/model_optim_rng\.pt)|"
    rf"(release/)?{re.escape(CHECKSUMS_FILE)}(\.\d+\.partial)?|"
    + "|".join(map(re.escape, _NAMES))
    + rf"|{TEMPLATE_FOLDER}/[^/]+\.jinja"
)
"""Names of the files that conversions write, below the folder of the output."""


class Manifest:
    """The finished units of a folder; only one process at a time may hold it.

    Args:
        folder: the unfinished output, created if missing. What it holds of another conversion is deleted, if all of it
            is files that conversions write.
        fingerprint: everything that the output depends on, as JSON values.

    Raises:
        CheckpointError: another process is writing there, or the folder holds something else than a conversion.
    """

    def __init__(self, folder: Path, fingerprint: dict[str, Any]) -> None:
        self.folder = folder
        self.finished: dict[str, Record] = {}
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / MANIFEST_FILE).is_file() and (found := sorted(folder.iterdir())):
            raise CheckpointError(
                f"{folder} is where an unfinished conversion belongs, but it holds {found[0].name} and no "
                f"{MANIFEST_FILE}: move it away or choose another --save"
            )
        self._stream = open(folder / MANIFEST_FILE, "a+", encoding="utf-8", errors="replace")  # noqa: SIM115
        if not try_lock(self._stream):
            self._stream.close()
            raise CheckpointError(f"{folder} is being written by another conversion: wait for it or stop it")
        lines = self._read_lines()
        if lines and lines[0] == json.loads(json.dumps(fingerprint)):
            self.finished = {line["unit"]: line for line in lines[1:] if "unit" in line and self._is_whole(line)}
            return
        self._clear()
        self._append(fingerprint)

    def _read_lines(self) -> list[dict[str, Any]]:
        self._stream.seek(0)
        lines = []
        for text in self._stream:
            if not text.endswith("\n"):
                self._stream.write("\n")  # a crash cut this line short; the next one must not continue it
                break
            if text.strip():
                try:
                    lines.append(json.loads(text))
                except ValueError:
                    continue  # a line that was cut short by an earlier crash; its unit is written again
        return lines

    def _is_whole(self, record: Record) -> bool:
        files = ((self.folder / name, size) for name, size in record["files"].items())
        return all(file.is_file() and file.stat().st_size == size for file, size in files)

    def _clear(self) -> None:
        """Delete what an earlier conversion wrote, and nothing that may be anybody else's."""
        paths = [path for path in self.folder.rglob("*") if path.name != MANIFEST_FILE]
        files = [path for path in paths if path.is_symlink() or not path.is_dir()]
        for path in files:
            if path.is_symlink() or not OWN_FILES.fullmatch(str(path.relative_to(self.folder))):
                self._stream.close()
                raise CheckpointError(
                    f"{self.folder} is left from another conversion, but {path} is no file that conversions write: "
                    "move it away, or delete the folder"
                )
        for path in files:
            path.unlink()
        for path in sorted(set(paths) - set(files), reverse=True):
            path.rmdir()
        self._stream.truncate(0)

    def _append(self, value: dict[str, Any]) -> None:
        self._stream.seek(0, os.SEEK_END)
        self._stream.write(json.dumps(value) + "\n")
        self._stream.flush()
        os.fsync(self._stream.fileno())

    def add(self, unit: str, record: Record) -> None:
        """Flush the files of a unit and work out the checksums that it lacks, then note that it is finished."""
        for name in record["files"]:
            flush(self.folder / name)
        known = record.get("checksums", {})
        sums = {name: known.get(name) or checksum(self.folder / name) for name in record["files"]}
        self.finished[unit] = {"unit": unit, **record, "checksums": sums}
        self._append(self.finished[unit])

    def finished_bytes(self) -> int:
        """Bytes of all finished files."""
        return sum(size for record in self.finished.values() for size in record["files"].values())

    def checksums(self) -> dict[str, str]:
        """Checksums of all finished files, by their names below the folder."""
        return {name: value for record in self.finished.values() for name, value in record["checksums"].items()}

    def move(self, folder: Path) -> None:
        """Give the complete folder its name, and delete the manifest."""
        os.rename(self.folder, folder)
        self.folder = folder
        (folder / MANIFEST_FILE).unlink()
        for path in (folder, folder.parent):
            flush(path)

    def __enter__(self) -> Manifest:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stream.close()
