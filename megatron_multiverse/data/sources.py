"""The input of a run, cut into shards.

The plan depends on the input alone, not on the number of workers, so that an interrupted run can be resumed with
another number.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

from megatron_multiverse.data.input_files import (
    PROMPT_SUFFIX,
    InputFiles,
    Kind,
    find_input_files,
    is_compressed,
    open_bytes,
    refuse_lfs_pointer,
    select_split,
)
from megatron_multiverse.data.readers import ASSUMED_ROW_BYTES, Shard, load_dataset, read_rows
from megatron_multiverse.errors import ConfigError, DataError

_MIN_SHARD_BYTES, _MAX_SHARD_BYTES, _WANTED_SHARDS = 1 << 20, 64 << 20, 128
_COMPRESSION = 4  # assumed, for the progress bar only
_SAMPLED_FILES, _SAMPLED_ROWS = 16, 1024


@dataclass(frozen=True)
class Source:
    """The input: what it consists of and its fingerprint."""

    inputs: list[InputFiles]
    shards: list[Shard]
    fingerprint: str

    @property
    def is_trajectories(self) -> bool:
        """Whether each row is a file of its own."""
        return self.inputs[0].kind == "trajectories"

    @property
    def files(self) -> list[Path]:
        """All files that are read, in order."""
        return [file for part in self.inputs for file in part.files]


def open_source(inputs: str | Sequence[str], *, split: str | None = None) -> Source:
    """Look at `--input` and plan its shards.

    Args:
        inputs: one or several of what `input_files.find_input_files` takes.
        split: which split of a Hugging Face data set, or of a folder whose files are named after splits; None takes
            train where there are splits.

    Raises:
        ConfigError: nothing readable there, several kinds of files in one folder, or a split that cannot be told.
    """
    names = [inputs] if isinstance(inputs, str) else list(inputs)
    if not names:
        raise ConfigError("--input is empty: give at least one file, folder or data set")
    found = [find_input_files(name) for name in names]
    if len({part.kind == "trajectories" for part in found}) > 1:
        raise ConfigError(
            "--input: trajectory files and rows cannot be mixed in one run: give each kind a run of its own"
        )
    parts = [part if part.kind == "dataset" else select_split(part, split) for part in found]
    _refuse_repeats(parts)
    sizes = {file: _size(part.kind, file) for part in parts for file in part.files}
    target = _shard_bytes(sum(size for size, _ in sizes.values()))
    digest = hashlib.sha256()
    shards: list[Shard] = []
    for part in parts:
        if part.kind == "dataset":
            shards += _cut_dataset(part.name, split, digest)
        elif part.kind != "trajectories":
            shards += [shard for file in part.files for shard in _cut(part.kind, file, *sizes[file], target)]
    if parts[0].kind == "trajectories":
        files = [file for part in parts for file in part.files]
        shards = _cut_files(files, [sizes[file][0] for file in files], target // 8)
    for part in parts:
        _hash_files(part, digest)
    return Source(parts, shards, digest.hexdigest())


def column_names(source: Source) -> list[str]:
    """Columns of the input: those in the schemas of its first files, and for JSON Lines in their first rows, together.

    Raises:
        ConfigError: there is no readable row.
    """
    names: dict[str, None] = {}
    problem, where = None, ""
    for shard in [shard for shard in source.shards if shard.start == 0][:_SAMPLED_FILES]:
        if shard.kind == "parquet":
            import pyarrow.parquet as pq

            names |= dict.fromkeys(pq.read_schema(shard.path).names)
        elif shard.kind == "dataset":
            names |= dict.fromkeys(load_dataset(shard.path).column_names)
        elif shard.kind == "jsonl":
            for row in islice(read_rows(shard), _SAMPLED_ROWS):
                names |= dict.fromkeys(row.fields)
                if problem is None and row.error:
                    problem, where = row.error, str(shard.path)
    if not names:
        files = ", ".join([str(file) for part in source.inputs for file in part.files][:_SAMPLED_FILES])
        told = f"; the first one is {problem}" if problem else ": empty"
        raise ConfigError(f"{where or files}: the input holds no readable row{told}")
    return list(names)


def _refuse_repeats(parts: Sequence[InputFiles]) -> None:
    seen: set[str] = set()
    for part in parts:
        for name in [str(file.resolve()) for file in part.files] or [part.name]:
            if name in seen:
                raise ConfigError(f"--input: {name} is given twice")
            seen.add(name)


def _size(kind: Kind, file: Path) -> tuple[int, int]:
    """Bytes of text and number of units (bytes or rows) of a file; refuses what only looks like data."""
    refuse_lfs_pointer(file)
    size = file.stat().st_size
    if kind == "jsonl":
        _refuse_array(file)
        return size * _COMPRESSION if is_compressed(file) else size, size
    if kind == "trajectories":
        return size, 1
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        metadata = pq.read_metadata(file)
    except (pa.ArrowException, OSError) as error:
        raise ConfigError(f"{file} is damaged or no Parquet file ({error}): fetch it again") from error
    return sum(metadata.row_group(g).total_byte_size for g in range(metadata.num_row_groups)), metadata.num_rows


def _refuse_array(file: Path) -> None:
    try:
        with open_bytes(file) as stream:
            start = stream.read(256)
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise ConfigError(f"{file} is damaged or cut off ({error}): fetch it again") from error
    if start.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
        raise ConfigError(f"{file} is a JSON array; write one object per line: jq -c '.[]' {file} > rows.jsonl")


def _shard_bytes(total: int) -> int:
    return min(max(total // _WANTED_SHARDS, _MIN_SHARD_BYTES), _MAX_SHARD_BYTES)


def _cut(kind: Kind, path: Path | str, num_bytes: int, units: int, target: int) -> list[Shard]:
    # What is compressed can be read from its start only.
    count = 1 if is_compressed(path) else max(1, min(-(-num_bytes // target), units))
    borders = [units * k // count for k in range(count + 1)]
    return [
        Shard(kind, str(path), start, stop, num_bytes // count) for start, stop in pairwise(borders) if stop > start
    ]


def _cut_files(files: Sequence[Path], sizes: Sequence[int], target: int) -> list[Shard]:
    """Neighbouring files grouped until a group has the wanted size."""
    shards: list[Shard] = []
    start = weight = 0
    for stop, size in enumerate(sizes, 1):
        weight += size
        if weight >= target or stop == len(files):
            names = tuple(map(str, files[start:stop]))
            shards.append(Shard("trajectories", str(files[start].parent), start, stop, weight, names))
            start, weight = stop, 0
    return shards


def _cut_dataset(name: str, split: str | None, digest: hashlib._Hash) -> list[Shard]:
    full_name = f"{name}@{split or 'train'}"
    try:
        table = load_dataset(full_name)
    except (OSError, ValueError, KeyError, DataError) as error:
        raise ConfigError(
            f"--input {name} --split {split or 'train'}: no such file, folder or data set ({error})"
        ) from error
    if Path(name).is_dir() and not (Path(name) / "dataset_dict.json").is_file():
        _check_split_of_table(name, table.split, split)
    digest.update(f"{full_name}:{table._fingerprint}".encode())
    num_bytes = table.num_rows * ASSUMED_ROW_BYTES
    return _cut("dataset", full_name, num_bytes, table.num_rows, _shard_bytes(num_bytes))


def _check_split_of_table(name: str, own: Any, split: str | None) -> None:
    """A folder saved from one split holds no other; it may say which one it is."""
    if own is None and split is not None:
        raise ConfigError(f"--split {split} has no effect on {name}, which holds one data set: leave it out")
    if own is not None and str(own) != (split or "train"):
        raise ConfigError(f"--input {name} was saved from the split {own}: say --split {own} if you want it")


def _hash_files(part: InputFiles, digest: hashlib._Hash) -> None:
    """Hash names, sizes, times and samples of the content: cheap on terabytes, and an edit changes the time."""
    files = list(part.files)
    if part.kind == "trajectories":
        sidecars = (file.with_name(file.stem + PROMPT_SUFFIX) for file in part.files)
        files += [sidecar for sidecar in sidecars if sidecar.is_file()]
    for file in files:
        stat = file.stat()
        digest.update(f"{file}\0{stat.st_size}\0{stat.st_mtime_ns}\0".encode())
        with open(file, "rb") as stream:
            for k in range(4):
                stream.seek(stat.st_size * k // 4)
                digest.update(stream.read(1 << 14))
