"""Which files `--input` stands for: a file, a pattern, a folder, or a data set by name; and the files of one split."""

from __future__ import annotations

import glob
import gzip
import io
import logging
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Literal

from megatron_multiverse.errors import ConfigError
from megatron_multiverse.files import is_lfs_pointer

logger = logging.getLogger(__name__)

Kind = Literal["jsonl", "parquet", "dataset", "trajectories"]
PROMPT_SUFFIX = ".prompt.txt"
"""NAME.prompt.txt holds the prompt of the trajectory NAME.xml or NAME.txt."""
_JSON_SUFFIXES = (".jsonl", ".json")
_COMPRESSED_SUFFIXES = (".gz", ".zst")
_TRAJECTORY_SUFFIXES = (".xml", ".txt")
_HUB_METADATA = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
_SPLIT_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
"""The words by which the `datasets` library, too, tells the files of a split."""
_SPLIT_OF = {word: split for split, words in _SPLIT_WORDS.items() for word in words}


@dataclass(frozen=True)
class InputFiles:
    """What one `--input` stands for."""

    kind: Kind
    name: str
    """As given."""
    files: list[Path] = field(default_factory=list)
    """In the order in which they are read; none for a data set."""
    root: Path | None = None
    """The folder in which they were found; None if a file was named itself."""


def find_input_files(name: str) -> InputFiles:
    """Look at one `--input`.

    Args:
        name: a JSON Lines (plain, .gz, .zst), Parquet or trajectory file (*.xml, *.txt), a pattern such as
            ``data/*.jsonl``, a folder of such files, a folder saved by `datasets`, or the name of a data set on the
            Hugging Face hub.

    Raises:
        ConfigError: nothing readable there, or files of several kinds.
    """
    path = Path(name)
    if path.is_dir():
        return _look_into(path)
    if path.is_file():
        return InputFiles(_kind_of(path), name, [path])
    if path.exists():
        raise ConfigError(f"--input {name} is not a regular file; write its rows into a .jsonl file first")
    if glob.has_magic(name):
        return _match(name)
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        return InputFiles("dataset", name)
    raise ConfigError(f"--input {name}: no such file or folder, and not a hub name (owner/name)")


def select_split(found: InputFiles, split: str | None) -> InputFiles:
    """Only the files of one split, where the names of files or folders say which is which.

    A file that was named itself is taken whatever its name.

    Args:
        found: files of a folder or pattern.
        split: the split that was asked for; None if none was, which means train.

    Raises:
        ConfigError: the split cannot be told from the names, or they name other splits only.
    """
    if found.root is None:
        if split is not None:
            raise ConfigError(f"--split {split} has no effect on the file {found.name}: leave it out")
        return found
    wanted = _SPLIT_OF.get(split or "train", split or "train")
    splits = {file: split_of(file.relative_to(found.root), wanted) for file in found.files}
    named = {value for value in splits.values() if value is not None}
    if not named and split is None:
        return found
    if wanted not in named:
        says = f"name the splits {', '.join(sorted(named))} only" if named else "name no split"
        raise ConfigError(
            f"--input {found.name}: the names of its files {says}, and {wanted} was asked for; choose with --split, "
            "or give the files themselves"
        )
    unnamed = [str(file) for file, value in splits.items() if value is None]
    if unnamed and named != {wanted}:
        raise ConfigError(
            f"--input {found.name}: some files are named after the splits {', '.join(sorted(named))}, but "
            f"{unnamed[0]} ({len(unnamed)} such) after none; give the files themselves"
        )
    files = [file for file, value in splits.items() if value in (wanted, None)]
    return InputFiles(found.kind, found.name, files, found.root)


def split_of(file: Path, wanted: str) -> str | None:
    """The split that a file belongs to by its name, else by the folders around it; None if they name none.

    Args:
        file: path inside of the input folder.
        wanted: a split that may have a name of its own, such as train_sft.

    Raises:
        ConfigError: one name holds the words of several splits.
    """
    for part in reversed(file.parts):
        name = part.lower()
        if wanted not in _SPLIT_WORDS and re.search(rf"(?<![a-z0-9]){re.escape(wanted.lower())}(?![a-z0-9])", name):
            return wanted
        found = {_SPLIT_OF[word] for word in re.findall("[a-z]+", name) if word in _SPLIT_OF}
        if len(found) > 1:
            names = ", ".join(sorted(found))
            raise ConfigError(f"{file} is named after several splits ({names}): give the files themselves")
        if found:
            return found.pop()
    return None


def trajectory_files(folder: Path) -> list[Path]:
    """The trajectory files of a folder in natural order (2.xml before 10.xml); sidecar prompts are left out."""
    return _natural_order(file for file in folder.iterdir() if file.is_file() and _kind_by_name(file) == "trajectories")


def open_bytes(path: str | Path) -> BinaryIO:
    """Open a file for reading; what ends in .gz or .zst is decompressed on the way."""
    suffix = Path(path).suffix.lower()
    if suffix == ".gz":
        return gzip.open(path, "rb")  # type: ignore[return-value]
    if suffix == ".zst":
        import pyarrow as pa

        return io.BufferedReader(pa.input_stream(str(path), compression="zstd"))
    return open(path, "rb")


def is_compressed(path: str | Path) -> bool:
    """Whether `open_bytes` decompresses the file, which can then be read from its start only."""
    return Path(path).suffix.lower() in _COMPRESSED_SUFFIXES


def refuse_lfs_pointer(path: str | Path) -> None:
    """Raise ConfigError if git put a pointer where the content of a large file should be."""
    if is_lfs_pointer(path):
        raise ConfigError(f"{path} is a git-lfs pointer, not the file itself: run `git lfs pull` in its folder")


def _kind_by_name(file: Path) -> Kind | None:
    name = file.name.lower()
    for suffix in _COMPRESSED_SUFFIXES:
        name = name.removesuffix(suffix) if any(name.endswith(s + suffix) for s in _JSON_SUFFIXES) else name
    if name.endswith(_JSON_SUFFIXES):
        return "jsonl"
    if name.endswith(".parquet"):
        return "parquet"
    if name.endswith(_TRAJECTORY_SUFFIXES) and not name.endswith(PROMPT_SUFFIX):
        return "trajectories"
    return None


def _kind_of(file: Path) -> Kind:
    kind = _kind_by_name(file)
    if kind is None:
        raise ConfigError(
            f"--input {file}: expected .jsonl, .json (one object per line; .gz and .zst too), .parquet, .xml, .txt or "
            "a folder"
        )
    return kind


def _look_into(folder: Path) -> InputFiles:
    if (folder / "dataset_dict.json").is_file() or all(
        (folder / name).is_file() for name in ("dataset_info.json", "state.json")
    ):
        return InputFiles("dataset", str(folder))
    found: dict[Kind, list[Path]] = {}
    sidecars, skipped = [], []
    for file in _walk(folder):
        kind = _kind_by_name(file)
        if file.name.endswith(PROMPT_SUFFIX):
            sidecars.append(file)
        elif kind is None or file.name in _HUB_METADATA or (kind == "trajectories" and file.parent != folder):
            skipped.append(str(file.relative_to(folder)))
        else:
            found.setdefault(kind, []).append(file)
    if len(found) != 1:
        raise ConfigError(
            f"--input {folder}: a folder must hold exactly one of *.jsonl, *.parquet, *.xml/*.txt trajectories or a "
            f"saved data set; found {sorted(found) or 'none'}. A pattern such as '{folder}/*.jsonl' names some of them"
        )
    ((kind, files),) = found.items()
    files = _natural_order(files) if kind == "trajectories" else sorted(files)
    if kind == "trajectories":
        stems = {file.stem for file in files}
        skipped += [file.name for file in sidecars if file.name.removesuffix(PROMPT_SUFFIX) not in stems]
    if skipped:
        logger.warning("%s: %d files are no input of this kind: %s", folder, len(skipped), _some(skipped))
    return InputFiles(kind, str(folder), files, folder)


def _match(pattern: str) -> InputFiles:
    files = [Path(name) for name in sorted(glob.glob(pattern, recursive=True)) if Path(name).is_file()]
    files = [file for file in files if file.name not in _HUB_METADATA and not file.name.endswith(PROMPT_SUFFIX)]
    if not files:
        raise ConfigError(f"--input {pattern}: no file matches this pattern")
    kinds = {_kind_of(file) for file in files}
    if len(kinds) > 1:
        raise ConfigError(f"--input {pattern}: matches files of several kinds ({', '.join(sorted(kinds))})")
    (kind,) = kinds
    root = Path(os.path.commonpath([file.parent for file in files]))
    return InputFiles(kind, pattern, _natural_order(files) if kind == "trajectories" else files, root)


def _walk(folder: Path) -> Iterator[Path]:
    """Files of a folder and the folders in it, sorted; hidden ones (.git, .cache) are no data."""
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(parent) / name for name in sorted(names) if not name.startswith("."))


def _natural_order(files: Iterable[Path]) -> list[Path]:
    def key(file: Path) -> list[int | str]:
        return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", file.name)]

    return sorted(files, key=key)


def _some(names: list[str], count: int = 5) -> str:
    return ", ".join(names[:count]) + (", ..." if len(names) > count else "")
