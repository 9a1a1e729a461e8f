"""What every format offers: a `Source` is a checkpoint that is read, a `Target` one that is written.

Whole megatron-core tensors travel between the two (names of the local spec, vocabulary without padding), so every
source goes with every target: Hugging Face and megatron-core, and megatron-core in another format or cut for other
parallel sizes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from megatron_multiverse.checkpoints.names.table import Entry, Family
from megatron_multiverse.checkpoints.recycled import empty
from megatron_multiverse.config import ModelConfig
from megatron_multiverse.dtypes import DTYPES

DTypeName = Literal["keep", "float32", "bf16", "float16"]
Side = Literal["hf", "mcore"]
"""Kind of a checkpoint: Hugging Face, or megatron-core with the trainer's model folders."""
Record = dict[str, Any]
Stream = Iterable[tuple[Entry, Tensor]]


class Source(Protocol):
    """A checkpoint that is read tensor by tensor."""

    folder: Path
    """The folder the user named."""
    config: ModelConfig
    """Shape of the model; vocab_size without the padding for tensor parallelism."""
    family: Family
    """Family of the model."""
    hf_config: dict[str, Any] | None
    """config.json of the Hugging Face model this checkpoint is or comes from, if known."""
    files: list[Path]
    """The files that hold the weights."""
    described_by: list[Path]
    """The small files that were read beside them: configs, indexes, records, metadata."""
    asset_folders: list[Path]
    """Where its tokenizer and generation settings may lie; the first folder with a tokenizer counts."""
    trained: bool
    """Whether the weights come from a training run, so that the rows of tags in them may be trained ones."""

    def entries(self) -> list[Entry]:
        """All tensors, in the order of the network."""
        ...

    def dtype(self, entry: Entry) -> torch.dtype:
        """Dtype of a tensor on disk."""
        ...

    def read(self, entry: Entry) -> Tensor:
        """One whole tensor in memory of its own.

        Raises:
            CheckpointError: it cannot be read, naming file and tensor.
        """
        ...

    def where(self, entry: Entry) -> Path:
        """A file that holds (a part of) the tensor, for messages."""
        ...


@dataclass(frozen=True)
class Unit:
    """What is written, finished and resumed as one: one output file, or the files of one pipeline stage."""

    name: str
    entries: tuple[Entry, ...]


class Target(Protocol):
    """A checkpoint that is written unit by unit."""

    units: list[Unit]
    total_bytes: int
    """Size of everything that will be written."""

    def write(self, unit: Unit, tensors: Stream, folder: Path) -> Record:
        """Write the files of a unit.

        Args:
            unit: the unit.
            tensors: its entries in order with their tensors.
            folder: the unfinished output folder.

        Returns:
            What `finish` needs to know of the unit, as JSON values; "files" maps each file written to its size,
            "checksums" to its checksum, where that was worked out while writing.
        """
        ...

    def finish(self, records: list[Record], folder: Path) -> None:
        """Write what spans the units: index, metadata, config. All units are complete."""
        ...


def target_dtype(source: Source, entry: Entry, name: DTypeName) -> torch.dtype:
    """Dtype that the tensor is written in."""
    return source.dtype(entry) if name == "keep" else DTYPES[name]


def group(entries: Iterable[Entry], sizes: Iterable[int], limit: int) -> Iterator[list[Entry]]:
    """Consecutive entries of at most `limit` bytes together; a larger tensor stands alone."""
    current: list[Entry] = []
    used = 0
    for entry, size in zip(entries, sizes, strict=True):
        if current and used + size > limit:
            yield current
            current, used = [], 0
        current.append(entry)
        used += size
    if current:
        yield current


def byte_size(dtype: torch.dtype, shape: Sequence[int]) -> int:
    """Bytes of a tensor."""
    return math.prod(shape) * dtype.itemsize


def entry_bytes(entry: Entry, dtype: torch.dtype) -> int:
    """Bytes of a whole tensor."""
    return byte_size(dtype, entry.shape)


def pad_rows(entry: Entry, tensor: Tensor, rows: int) -> Tensor:
    """Vocabulary matrices with zero rows added up to `rows`; other tensors as they are."""
    if entry.rule != "vocab" or len(tensor) == rows:
        return tensor
    padded = empty((rows, *tensor.shape[1:]), tensor.dtype, tensor.device)
    padded[: len(tensor)] = tensor
    padded[len(tensor) :] = 0  # padding stays recognisable
    return padded
