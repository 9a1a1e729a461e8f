"""Checksums of large files, so that a bit that flips on a disk or on the way is noticed.

Those of preprocessed data stand in its manifest. Those of a checkpoint stand in its `checksums.json`, which maps the
name of each file to its size and XXH3 hash and is written after the files. Text files are left out: people edit them,
and their readers notice damage. Files without an entry, and folders without checksums.json, such as those of other
programs, are not checked.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

import xxhash

from megatron_multiverse.errors import CheckpointError
from megatron_multiverse.files import write_json_atomic

CHECKSUMS_FILE = "checksums.json"
_ALGORITHM = "xxh3_64"
_PIECE = 16 << 20
_PLACES, _PLACE_SIZE = 64, 1 << 20
_TEXT_SUFFIXES = {".json", ".jsonl", ".jinja", ".md", ".txt"}


def checksum(file: Path) -> str:
    """Hash of a file's content."""
    digest = xxhash.xxh3_64()
    with open(file, "rb", buffering=0) as stream:
        while piece := stream.read(_PIECE):
            digest.update(piece)
    return digest.hexdigest()


def quick_checksum(file: Path) -> str:
    """Hash of a file's content up to 64 MiB; of a larger file's size and what stands at 64 places."""
    digest = xxhash.xxh3_64(str(file.stat().st_size).encode())
    for piece in sampled_pieces(file):
        digest.update(piece)
    return digest.hexdigest()


def sampled_pieces(file: Path) -> Iterator[bytes]:
    """All of a file up to 64 MiB; of a larger one 1 MiB at 64 evenly spread places, from the first to the last byte."""
    total = file.stat().st_size
    with open(file, "rb") as stream:
        if total <= _PLACES * _PLACE_SIZE:
            while piece := stream.read(_PLACE_SIZE):
                yield piece
            return
        for k in range(_PLACES):
            stream.seek((total - _PLACE_SIZE) * k // (_PLACES - 1))
            yield stream.read(_PLACE_SIZE)


def folder_checksums(folder: Path, *, without: Collection[str] = ()) -> dict[str, str]:
    """Checksums of the files below a folder, text left out, by their names relative to it.

    Args:
        folder: the folder.
        without: names of files that are left out, too.
    """
    files = {str(file.relative_to(folder)): file for file in sorted(folder.rglob("*")) if is_checked(file)}
    return {name: checksum(file) for name, file in files.items() if name not in without}


def is_checked(file: Path) -> bool:
    """Whether a file is one that gets a checksum."""
    return file.is_file() and file.suffix not in _TEXT_SUFFIXES


def write_checksums(folder: Path, known: Mapping[str, str]) -> None:
    """Write the checksums of files in a folder; they must be whole by now.

    Args:
        folder: the folder.
        known: name of each file, relative to the folder -> its checksum.
    """
    files = {name: {"size": (folder / name).stat().st_size, _ALGORITHM: value} for name, value in sorted(known.items())}
    write_json_atomic(folder / CHECKSUMS_FILE, files)


def check_files(folder: Path, *, part: int = 0, parts: int = 1) -> None:
    """Hold the files of a folder against their checksums; does nothing if it has none.

    Args:
        folder: the folder.
        part: this process looks at every `parts`-th file, from this one on.
        parts: number of processes that share the work.

    Raises:
        CheckpointError: a file is missing, of another size or has other content; the message names it.
    """
    for name, wanted in list(_read(folder).items())[part::parts]:
        file = folder / name
        if not file.is_file():
            raise CheckpointError(f"{file} is missing, {CHECKSUMS_FILE} names it: copy the folder again")
        if (size := file.stat().st_size) != wanted["size"]:
            raise CheckpointError(f"{file} has {size} bytes, it was written with {wanted['size']}: copy it again")
        if checksum(file) != wanted[_ALGORITHM]:
            raise CheckpointError(
                f"{file} is damaged: its content is not what was written (checksum in {CHECKSUMS_FILE}); copy it "
                f"again. If you changed it on purpose, delete {folder / CHECKSUMS_FILE}"
            )


def _read(folder: Path) -> dict[str, dict[str, str | int]]:
    file = folder / CHECKSUMS_FILE
    if not file.is_file():
        return {}
    try:
        files = json.loads(file.read_text(encoding="utf-8"))
        return {str(name): {"size": int(row["size"]), _ALGORITHM: str(row[_ALGORITHM])} for name, row in files.items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{file} is damaged ({type(error).__name__}: {error}): copy it again") from error
