"""Where a run keeps unfinished work, and proof of what is ours: nothing else is ever deleted or replaced.

PREFIX.shards holds plan.json, which says what is being made, and the finished shards. A folder of that name is used
only if it is new, or carries such a plan and holds nothing but files that a run writes. One process at a time holds it.
"""

from __future__ import annotations

import json
import logging
import os
import re
import time
from pathlib import Path
from typing import IO, Any

from megatron_multiverse.errors import DataError
from megatron_multiverse.files import try_lock, write_json_atomic

logger = logging.getLogger(__name__)

OUTPUT_SUFFIXES = (".bin", ".idx", "_manifest.json", "_rejected.jsonl")
_PLAN, _LOCK = "plan.json", "lock"
_OURS = re.compile(
    r"plan\.json|lock|joined\.(bin|idx)|rejected\.jsonl|\d{5,}(\.\d+)?\.(bin|npy)|\d{5,}\.json|(plan|\d{5,})\.json\.\d+\.partial"
)
_KEY = re.compile("[0-9a-f]{64}")
_PATIENCE_S = 2.0  # a killed run's workers take a moment to end


class WorkFolder:
    """The folder of one run, locked from `__enter__` to `__exit__`.

    Args:
        output_prefix: path of the outputs without suffix; the folder is OUTPUT_PREFIX.shards.
        key: hash of all that decides the output bytes. What the folder holds of a run with another key is deleted.

    Raises:
        DataError: on entering: the folder is not ours, or another run holds it.
    """

    def __init__(self, output_prefix: str, key: str) -> None:
        self.path = Path(f"{output_prefix}.shards")
        self.key = key
        self._lock: IO[str] | None = None

    def __enter__(self) -> WorkFolder:
        _refuse_foreign(self.path)
        deadline = time.monotonic() + _PATIENCE_S
        while not self._try_lock():
            if time.monotonic() > deadline:
                raise DataError(
                    f"another run is writing to {self.path}: wait for it, or choose another --output-prefix"
                )
            time.sleep(0.05)
        try:
            self._begin()
        except BaseException:
            self.unlock()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.unlock()

    def unlock(self) -> None:
        """Let go of the folder. A forked worker does so too: its copy of the lock would outlive the run."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def part(self, number: int) -> Path:
        """Path of a shard without suffix."""
        return self.path / f"{number:05d}"

    def is_finished(self, number: int) -> bool:
        """Whether an earlier run has written the shard whole."""
        return all(self.part(number).with_suffix(suffix).is_file() for suffix in (".bin", ".npy", ".json"))

    @property
    def distrusted(self) -> str | None:
        """Why an earlier run gave up a fast encoder, if it did."""
        return read_object(self.path / _PLAN).get("distrusted")

    def distrust(self, encoder: str, reason: str) -> None:
        """Delete the shards that an encoder has written, and keep in mind that it is not to be used again."""
        write_json_atomic(self.path / _PLAN, {"key": self.key, "distrusted": reason})
        for report in self.path.glob("*.json"):
            if report.name != _PLAN and read_object(report).get("encoder") == encoder:
                report.unlink()

    def delete(self) -> None:
        """Delete what runs have written here, the proof of it last, and the folder if nothing else is in it."""
        self._clear()
        for name in (_PLAN, _LOCK):
            (self.path / name).unlink(missing_ok=True)
        try:
            self.path.rmdir()
        except OSError:
            logger.warning("%s stays: something else was put into it", self.path)

    def _try_lock(self) -> bool:
        self.path.mkdir(parents=True, exist_ok=True)
        try:
            lock = open(self.path / _LOCK, "a", encoding="utf-8")  # noqa: SIM115 (open until `unlock`)
        except FileNotFoundError:
            return False  # the run that held it has just deleted the folder
        try:
            is_current = try_lock(lock) and os.path.samestat(os.fstat(lock.fileno()), os.stat(self.path / _LOCK))
        except FileNotFoundError:
            is_current = False
        if is_current:
            self._lock = lock
        else:
            lock.close()
        return is_current

    def _begin(self) -> None:
        plan = read_object(self.path / _PLAN)
        if plan.get("key") == self.key:
            return
        if plan:
            logger.info("input, tokenizer or settings changed since the interrupted run: beginning anew")
            self._clear()
        write_json_atomic(self.path / _PLAN, {"key": self.key})

    def _clear(self) -> None:
        for entry in _entries(self.path):
            if _is_ours(entry) and entry.name not in (_PLAN, _LOCK):
                os.unlink(entry.path)


def delete_leftovers(output_prefix: str, key: str) -> None:
    """Delete the folder of a run that was stopped when its outputs were whole already."""
    if read_object(Path(f"{output_prefix}.shards") / _PLAN).get("key") == key:
        with WorkFolder(output_prefix, key) as folder:
            folder.delete()


def refuse_foreign_outputs(output_prefix: str, key: str) -> None:
    """Refuse to replace files that no run of ours is known to have written; say which of ours will be replaced.

    Proof is a manifest beside them, or the plan of a run that was cut off while it replaced them.

    Args:
        output_prefix: path of the outputs without suffix.
        key: hash of all that decides the output bytes.

    Raises:
        DataError: such files exist; nothing is changed.
    """
    present = [f"{output_prefix}{suffix}" for suffix in OUTPUT_SUFFIXES if os.path.lexists(f"{output_prefix}{suffix}")]
    manifest = read_object(Path(f"{output_prefix}_manifest.json"))
    is_ours = has_key(manifest) or has_key(read_object(Path(f"{output_prefix}.shards") / _PLAN))
    if present and not is_ours:
        raise DataError(
            f"{', '.join(present)} exist, and {output_prefix}_manifest.json, which would show that preprocessing "
            "wrote them, is missing or damaged: choose another --output-prefix, or move them away"
        )
    if has_key(manifest) and manifest["key"] != key:
        logger.warning(
            "replacing %s.bin and .idx, which were made from %s with the tokenizer %s",
            output_prefix, manifest.get("input"), manifest.get("tokenizer_model"),
        )  # fmt: skip


def warn_of_old_index(output_prefix: str) -> None:
    """Name the index of samples that megatron-core's GPTDataset keeps for these outputs, after they were written anew.

    megatron-core finds it by the path and the settings alone, and would read the new data through it.
    """
    index = Path(output_prefix) / "cache" / "GPTDataset_indices"
    if index.is_dir():
        logger.warning(
            "%s: Megatron made this index from the data that stood here before, and would read the new ones by it "
            "without a word. Delete it before training with Megatron's own GPTDataset",
            index,
        )


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file that a run wrote; {} if there is none or it is damaged."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        logger.warning("%s is damaged (%s)", path, error)
        return {}
    return value if isinstance(value, dict) else {}


def has_key(value: dict[str, Any]) -> bool:
    """Whether this is a manifest or a plan of ours."""
    return isinstance(value.get("key"), str) and _KEY.fullmatch(value["key"]) is not None


def _refuse_foreign(folder: Path) -> None:
    if not os.path.lexists(folder):
        return
    if not folder.is_dir():
        raise DataError(f"{folder} is in the way: unfinished work is kept in a folder of this name; move it away")
    entries = _entries(folder)
    foreign = sorted(entry.name for entry in entries if not _is_ours(entry))
    # A run that has only just begun has its lock, and is about to write its plan.
    is_new = all(entry.name == _LOCK or entry.name.startswith(_PLAN + ".") for entry in entries)
    if foreign or not (is_new or has_key(read_object(folder / _PLAN))):
        why = f"it holds {foreign[0]}" if foreign else f"its {_PLAN} is missing or damaged"
        raise DataError(
            f"{folder} is where unfinished work would be kept, but nothing shows that an earlier run made it ({why}). "
            "Nothing was changed: choose another --output-prefix, or move or delete the folder"
        )


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except FileNotFoundError:
        return []  # the run that held it has just deleted it


def _is_ours(entry: os.DirEntry[str]) -> bool:
    return _OURS.fullmatch(entry.name) is not None and entry.is_file(follow_symlinks=False)
