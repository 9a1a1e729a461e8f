"""The rows of a shard.

A shard is a range of one source: bytes of a JSON Lines file, rows of a Parquet file or of a Hugging Face data set, or
some trajectory files. A row that cannot be read is a row with an error and does not disturb the others; a file that
cannot be read stops the run.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_multiverse.data.hub import asking_hub
from megatron_multiverse.data.input_files import PROMPT_SUFFIX, Kind, is_compressed, open_bytes
from megatron_multiverse.data.turns import RowError
from megatron_multiverse.errors import DataError

ASSUMED_ROW_BYTES = 32 << 10
"""A Multiverse-1K trajectory; used where rows have no known size."""


@dataclass(frozen=True)
class Shard:
    """A half-open range [start, stop) of one source: bytes (jsonl), rows (parquet, dataset) or files."""

    kind: Kind
    path: str
    start: int
    stop: int
    num_bytes: int
    """Weight for progress and ETA."""
    files: tuple[str, ...] = ()
    """The trajectory files; file k is row start + k + 1."""


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


def read_rows(shard: Shard, columns: list[str] | None = None, prompt: str = "") -> Iterator[RawRow]:
    """Rows of a shard, in order. Rows that cannot be read come with `error` set.

    Args:
        shard: what to read.
        columns: columns wanted, of which a source need not have all (all if None); others are not read from Parquet
            files and data sets.
        prompt: prompt of trajectory files without a sidecar NAME.prompt.txt.

    Raises:
        DataError: the file itself is damaged.
    """
    if shard.kind == "jsonl":
        return _read_compressed(shard) if is_compressed(shard.path) else _read_jsonl(shard)
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
            yield parse_line(number, line)


def _read_compressed(shard: Shard) -> Iterator[RawRow]:
    with open_bytes(shard.path) as stream:
        try:
            for number, line in enumerate(stream, 1):
                yield parse_line(number, line)
        except (OSError, EOFError, ValueError, zlib.error) as error:
            raise DataError(f"{shard.path} is damaged or cut off ({error}): fetch it again") from error


def parse_line(number: int, line: bytes) -> RawRow:
    """The row on one line of a JSON Lines file."""
    if line.isspace():
        return RawRow(number, "", {}, len(line), is_blank=True)
    try:
        fields = json.loads(line)
    except json.JSONDecodeError as error:
        return RawRow(number, "", {}, len(line), RowError("json", f"not JSON: {error.msg}", char_index=error.pos))
    except UnicodeDecodeError as error:
        return RawRow(number, "", {}, len(line), RowError("encoding", f"not UTF-8 at byte {error.start}"))
    except Exception as error:  # valid JSON that Python's reader refuses: nested too deep, a number too long
        return RawRow(number, "", {}, len(line), RowError("json", f"cannot be read: {error}"))
    if not isinstance(fields, dict):
        return RawRow(number, "", {}, len(line), RowError("json", f"a {type(fields).__name__}, not an object"))
    return RawRow(number, "", fields, len(line))


def _read_parquet(shard: Shard, columns: list[str] | None) -> Iterator[RawRow]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    weight = shard.num_bytes // max(shard.stop - shard.start, 1)
    try:
        file = pq.ParquetFile(shard.path)
        first = 0
        for group in range(file.num_row_groups):
            count = file.metadata.row_group(group).num_rows
            if first + count > shard.start and first < shard.stop:
                row = first
                for batch in file.iter_batches(64, row_groups=[group], columns=columns):
                    start, stop = max(shard.start - row, 0), min(shard.stop - row, batch.num_rows)
                    for k in range(start, stop):
                        yield _parquet_row(batch, k, row + k + 1, weight)
                    row += batch.num_rows
            first += count
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{shard.path} is damaged or cut off ({error}): fetch it again") from error


def cells(batch: Any, index: int) -> dict[str, Any]:
    """The cells of one row of an Arrow batch by column, not yet Python values."""
    return {name: column[index] for name, column in zip(batch.schema.names, batch.columns, strict=True)}


def _parquet_row(batch: Any, index: int, number: int, weight: int) -> RawRow:
    try:
        return RawRow(number, "", {name: cell.as_py() for name, cell in cells(batch, index).items()}, weight)
    except UnicodeDecodeError as error:
        return RawRow(number, "", {}, weight, RowError("encoding", f"not UTF-8 at byte {error.start}"))
    except Exception as error:  # e.g. a date that Python cannot hold
        return RawRow(number, "", {}, weight, RowError("unreadable", f"cannot be read: {error}"))


def _read_dataset(shard: Shard, columns: list[str] | None) -> Iterator[RawRow]:
    table = load_dataset(shard.path)
    table = table.select_columns([name for name in columns if name in table.column_names]) if columns else table
    for number in range(shard.start, shard.stop):
        try:
            yield RawRow(number + 1, "", table[number], ASSUMED_ROW_BYTES)
        except Exception as error:
            yield RawRow(number + 1, "", {}, ASSUMED_ROW_BYTES, RowError("unreadable", f"cannot be read: {error}"))


def load_dataset(name: str, config: str | None = None) -> Any:
    """The Hugging Face data set "NAME@SPLIT": a folder saved by `datasets`, or a name on the hub.

    Args:
        name: of data set and split.
        config: which one of the data set's configurations, on the hub.

    Raises:
        DataError: the hub cannot be reached, and its cache has no such data set.
        Exception: what the library `datasets` raises.
    """
    import datasets

    path, _, split = name.rpartition("@")
    if not Path(path).is_dir():
        with asking_hub() as why_not:
            try:
                return datasets.load_dataset(path, config, split=split)
            except ConnectionError as error:
                raise DataError(f"the hub's cache does not hold {path}, while {why_not or error}") from error
    loaded = datasets.load_from_disk(path)
    return loaded[split] if isinstance(loaded, datasets.DatasetDict) else loaded


def _read_trajectories(shard: Shard, prompt: str) -> Iterator[RawRow]:
    for number, name in enumerate(shard.files, start=shard.start + 1):
        file = Path(name)
        try:
            sidecar = file.with_name(file.stem + PROMPT_SUFFIX)
            own = trajectory_text(sidecar.read_bytes()) if sidecar.is_file() else prompt
            raw = file.read_bytes()
            yield RawRow(number, file.name, {"prompt": own, "response": trajectory_text(raw)}, len(raw))
        except UnicodeDecodeError as error:
            failure = RowError("encoding", f"not UTF-8 at byte {error.start}")
            yield RawRow(number, file.name, {}, len(error.object), failure)
        except OSError as error:
            yield RawRow(number, file.name, {}, 0, RowError("unreadable", f"cannot be read: {error}"))


def trajectory_text(raw: bytes) -> str:
    """The text of a trajectory file: without a byte order mark, and without the newline that ends the file's last line.

    Raises:
        UnicodeDecodeError: it is not UTF-8.
    """
    return re.sub(r"\r?\n\Z", "", raw.decode().removeprefix("\ufeff"))
