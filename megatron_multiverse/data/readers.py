"""Input files cut into shards, and the rows of a shard.

A shard is a range of one source: bytes of a JSON Lines file, rows of a Parquet file or of a Hugging Face data set,
files of a folder of trajectories. The plan depends on the input alone, not on the number of workers, so that an
interrupted run can be resumed with another number.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from megatron_multiverse.data.prompts import RowError
from megatron_multiverse.errors import ConfigError

Kind = Literal["jsonl", "parquet", "dataset", "trajectories"]
_JSON_SUFFIXES = (".jsonl", ".json")
_TRAJECTORY_SUFFIXES = (".xml", ".txt")
_PROMPT_SUFFIX = ".prompt.txt"
_MIN_SHARD_BYTES, _MAX_SHARD_BYTES, _WANTED_SHARDS = 256 << 10, 64 << 20, 128
_ASSUMED_ROW_BYTES = 32 << 10  # a Multiverse-1K trajectory; used where rows have no known size


@dataclass(frozen=True)
class Shard:
    """A half-open range [start, stop) of one source: bytes (jsonl), rows (parquet, dataset) or files."""

    kind: Kind
    path: str
    start: int
    stop: int
    num_bytes: int
    """Weight for progress and ETA."""


@dataclass(frozen=True)
class RawRow:
    """One row as read: its fields, or why it cannot be read."""

    row: int
    """1-based. Counted within the shard for jsonl, within the source otherwise."""
    name: str
    """Name of the file, where each row is a file of its own; else empty."""
    fields: dict[str, Any]
    num_bytes: int
    error: RowError | None = None
    is_blank: bool = False
    """An empty line, which counts as a line and as nothing else."""


@dataclass(frozen=True)
class Source:
    """The input: what it consists of and its fingerprint."""

    kind: Kind
    shards: list[Shard]
    fingerprint: str


def open_source(input_path: str, *, split: str = "train") -> Source:
    """Look at `--input` and plan its shards.

    Args:
        input_path: a JSON Lines or Parquet file, a folder of such files, a folder saved by `datasets`, a folder of
            trajectory files (*.xml, *.txt), or the name of a data set on the Hugging Face hub.
        split: which split of a Hugging Face data set.

    Raises:
        ConfigError: nothing readable there, or several kinds of files in one folder.
    """
    path = Path(input_path)
    if path.is_dir():
        kind, files = _look_into(path)
    elif path.is_file():
        kind, files = _kind_of(path), [path]
    elif re.fullmatch(r"[\w.-]+/[\w.-]+", input_path):
        kind, files = "dataset", []
    else:
        raise ConfigError(f"--input {input_path}: no such file or folder, and not a hub name (owner/name)")
    if kind == "dataset":
        return _dataset_source(input_path, split)
    if kind == "trajectories":
        shards = _cut_files(path, files)
        files = sorted([*files, *path.glob("*" + _PROMPT_SUFFIX)])
    else:
        sizes = [_size(kind, file) for file in files]
        target = _shard_bytes(sum(size for size, _ in sizes))
        shards = [s for f, (size, units) in zip(files, sizes, strict=True) for s in _cut(kind, f, size, units, target)]
    return Source(kind, shards, _fingerprint(files))


def trajectory_files(folder: Path) -> list[Path]:
    """The trajectory files of a folder in natural order (2.xml before 10.xml); sidecar prompts are left out."""
    files = [f for f in folder.iterdir() if f.suffix in _TRAJECTORY_SUFFIXES and not f.name.endswith(_PROMPT_SUFFIX)]
    return sorted(files, key=lambda f: [int(p) if p.isdigit() else p for p in re.split(r"(\d+)", f.name)])


def column_names(source: Source) -> list[str]:
    """Columns of the input (of its first readable row, for JSON Lines)."""
    for shard in source.shards:
        if shard.kind == "parquet":
            import pyarrow.parquet as pq

            return list(pq.read_schema(shard.path).names)
        if shard.kind == "dataset":
            return list(_load_dataset(shard.path).column_names)
        for row in read_rows(shard):
            if row.error is None and not row.is_blank:
                return list(row.fields)
    raise ConfigError("the input holds no readable row")


def read_rows(shard: Shard, columns: list[str] | None = None, prompt: str = "") -> Iterator[RawRow]:
    """Rows of a shard, in order. Rows that cannot be read come with `error` set.

    Args:
        shard: what to read.
        columns: columns needed (all if None); Parquet reads no others.
        prompt: prompt of trajectory files without a sidecar NAME.prompt.txt.
    """
    if shard.kind == "jsonl":
        return _read_jsonl(shard)
    if shard.kind == "parquet":
        return _read_parquet(shard, columns)
    if shard.kind == "dataset":
        return _read_dataset(shard, columns)
    return _read_trajectories(shard, prompt)


def _read_jsonl(shard: Shard) -> Iterator[RawRow]:
    """Lines that *begin* in [start, stop): a line that crosses `stop` belongs to the shard it begins in."""
    with open(shard.path, "rb") as stream:
        if shard.start > 0:
            # One byte earlier: if that byte ends a line, nothing is skipped and the next line begins at `start`.
            stream.seek(shard.start - 1)
            stream.readline()
        number = 0
        while stream.tell() < shard.stop and (line := stream.readline()):
            number += 1
            yield RawRow(number, "", {}, len(line), is_blank=True) if line.isspace() else _parse_line(number, line)


def _parse_line(number: int, line: bytes) -> RawRow:
    try:
        fields = json.loads(line)
    except json.JSONDecodeError as error:
        return RawRow(number, "", {}, len(line), RowError("json", f"not JSON: {error.msg}", char_index=error.pos))
    except UnicodeDecodeError as error:
        return RawRow(number, "", {}, len(line), RowError("encoding", f"not UTF-8 at byte {error.start}"))
    if not isinstance(fields, dict):
        return RawRow(number, "", {}, len(line), RowError("json", f"a {type(fields).__name__}, not an object"))
    return RawRow(number, "", fields, len(line))


def _read_parquet(shard: Shard, columns: list[str] | None) -> Iterator[RawRow]:
    import pyarrow.parquet as pq

    file = pq.ParquetFile(shard.path)
    weight = shard.num_bytes // max(shard.stop - shard.start, 1)
    first = 0
    for group in range(file.num_row_groups):
        count = file.metadata.row_group(group).num_rows
        if first + count > shard.start and first < shard.stop:
            row = first
            for batch in file.iter_batches(64, row_groups=[group], columns=columns):
                if row + batch.num_rows > shard.start and row < shard.stop:
                    for number, fields in enumerate(batch.to_pylist(), start=row):
                        if shard.start <= number < shard.stop:
                            yield RawRow(number + 1, "", fields, weight)
                row += batch.num_rows
        first += count


def _read_dataset(shard: Shard, columns: list[str] | None) -> Iterator[RawRow]:
    table = _load_dataset(shard.path)
    table = table.select_columns(columns) if columns else table
    for number in range(shard.start, shard.stop):
        yield RawRow(number + 1, "", table[number], _ASSUMED_ROW_BYTES)


def _read_trajectories(shard: Shard, prompt: str) -> Iterator[RawRow]:
    files = trajectory_files(Path(shard.path))
    for number, file in enumerate(files[shard.start : shard.stop], start=shard.start + 1):
        sidecar = file.with_name(file.stem + _PROMPT_SUFFIX)
        raw = file.read_bytes()
        try:
            text = raw.decode()
            own = sidecar.read_bytes().decode() if sidecar.is_file() else prompt
        except UnicodeDecodeError as error:
            failure = RowError("encoding", f"not UTF-8 at byte {error.start}")
            yield RawRow(number, file.name, {}, len(raw), failure)
            continue
        yield RawRow(number, file.name, {"prompt": own, "response": text}, len(raw))


def _look_into(folder: Path) -> tuple[Kind, list[Path]]:
    if any((folder / name).is_file() for name in ("dataset_info.json", "dataset_dict.json")):
        return "dataset", []
    found: dict[Kind, list[Path]] = {
        "parquet": sorted(folder.rglob("*.parquet")),
        "jsonl": sorted(f for f in folder.iterdir() if f.suffix in _JSON_SUFFIXES),
        "trajectories": trajectory_files(folder),
    }
    present = [kind for kind, files in found.items() if files]
    if len(present) != 1:
        raise ConfigError(
            f"--input {folder}: a folder must hold exactly one of *.jsonl, *.parquet, *.xml/*.txt trajectories or a "
            f"saved data set; found {present or 'none'}"
        )
    return present[0], found[present[0]]


def _kind_of(file: Path) -> Kind:
    if file.suffix in _JSON_SUFFIXES:
        return "jsonl"
    if file.suffix == ".parquet":
        return "parquet"
    raise ConfigError(f"--input {file}: expected .jsonl, .json (one object per line), .parquet or a folder")


def _size(kind: Kind, file: Path) -> tuple[int, int]:
    """Bytes of text and number of units (bytes or rows) of a file."""
    if kind == "jsonl":
        return file.stat().st_size, file.stat().st_size
    import pyarrow.parquet as pq

    metadata = pq.read_metadata(file)
    return sum(metadata.row_group(g).total_byte_size for g in range(metadata.num_row_groups)), metadata.num_rows


def _shard_bytes(total: int) -> int:
    return min(max(total // _WANTED_SHARDS, _MIN_SHARD_BYTES), _MAX_SHARD_BYTES)


def _cut(kind: Kind, path: Path | str, num_bytes: int, units: int, target: int) -> list[Shard]:
    count = max(1, min(-(-num_bytes // target), units))
    borders = [units * k // count for k in range(count + 1)]
    return [
        Shard(kind, str(path), start, stop, num_bytes // count) for start, stop in pairwise(borders) if stop > start
    ]


def _cut_files(folder: Path, files: list[Path]) -> list[Shard]:
    """Neighbouring files grouped until a group has the wanted size."""
    sizes = [file.stat().st_size for file in files]
    target, shards, start = _shard_bytes(sum(sizes)) // 8, [], 0
    for stop in range(1, len(files) + 1):
        weight = sum(sizes[start:stop])
        if weight >= target or stop == len(files):
            shards.append(Shard("trajectories", str(folder), start, stop, weight))
            start = stop
    return shards


def _load_dataset(name: str) -> Any:
    import datasets

    path, _, split = name.rpartition("@")
    if not Path(path).is_dir():
        return datasets.load_dataset(path, split=split)
    loaded = datasets.load_from_disk(path)
    return loaded[split] if isinstance(loaded, datasets.DatasetDict) else loaded


def _dataset_source(input_path: str, split: str) -> Source:
    name = f"{input_path}@{split}"
    try:
        table = _load_dataset(name)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(
            f"--input {input_path} --split {split}: no such file, folder or data set ({error})"
        ) from error
    num_bytes = table.num_rows * _ASSUMED_ROW_BYTES
    shards = _cut("dataset", name, num_bytes, table.num_rows, _shard_bytes(num_bytes))
    return Source("dataset", shards, f"{name}:{table._fingerprint}")


def _fingerprint(files: list[Path]) -> str:
    """Hash of names, sizes, times and samples of the content: cheap on terabytes, and an edit changes the time."""
    digest = hashlib.sha256()
    for file in files:
        stat = file.stat()
        digest.update(f"{file}\0{stat.st_size}\0{stat.st_mtime_ns}\0".encode())
        with open(file, "rb") as stream:
            for k in range(4):
                stream.seek(stat.st_size * k // 4)
                digest.update(stream.read(1 << 14))
    return digest.hexdigest()
