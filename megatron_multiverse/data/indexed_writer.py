"""Writes Megatron's .bin/.idx in parts: workers write shards, and the parent joins them, one after the other.

The bytes are those of megatron-core's IndexedDatasetBuilder fed the same ids (a test compares them). That builder
holds every length of the data set in Python lists and needs torch; here a worker needs numpy only, and the parent
keeps one shard's lengths at a time.

Format of .idx (megatron.core.datasets.indexed_dataset): magic, version 1, dtype code, number of sequences, number of
document borders, int32 lengths, int64 byte offsets, int64 document borders.
"""

from __future__ import annotations

import os
import shutil
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megatron_multiverse.errors import DataError
from megatron_multiverse.large_files import LargeFile

_MAGIC = b"MMIDIDX\x00\x00"
_DTYPE_CODES = {np.dtype(np.int32): 4, np.dtype(np.uint16): 8}
_UINT16_LIMIT = 65500  # megatron-core's DType.optimal_dtype
SEQUENCES_PER_DOCUMENT = 2
"""Prompt and response, unless both are written as one sequence."""


def optimal_dtype(vocab_size: int) -> np.dtype[np.integer]:
    """uint16 for vocabularies below 65,500, else int32: megatron-core's rule, which its readers know."""
    return np.dtype(np.uint16) if vocab_size < _UINT16_LIMIT else np.dtype(np.int32)


class ShardWriter:
    """Appends documents to PATH.bin and, on `close`, their lengths to PATH.npy; both appear by rename, whole.

    The unfinished files carry the process id: a worker that outlives its killed parent for a moment cannot write
    into the files of the run that resumes.

    Args:
        path: path without suffix.
        dtype: dtype of the ids.
        vocab_size: ids must lie in [0, vocab_size).
        one_sequence: write prompt and response as one sequence.
    """

    def __init__(self, path: Path, dtype: np.dtype[np.integer], vocab_size: int, *, one_sequence: bool = False) -> None:
        self._path = path
        self._part = f"{path}.{os.getpid()}"
        self._dtype = dtype
        self._vocab_size = vocab_size
        self._one_sequence = one_sequence
        self._bin = open(f"{self._part}.bin", "wb")  # noqa: SIM115 (open until `close`)
        self._lengths: list[int] = []

    def add(self, documents: Sequence[tuple[npt.NDArray[np.integer], npt.NDArray[np.integer]]]) -> None:
        """Append documents, the ids of prompt and response of each.

        Raises:
            DataError: an id lies outside of the vocabulary.
        """
        if not documents:
            return
        ids = np.concatenate([sequence for document in documents for sequence in document])
        if ids.size and not 0 <= int(ids.min()) <= int(ids.max()) < self._vocab_size:
            raise DataError(
                f"token ids {int(ids.min())}..{int(ids.max())} leave the vocabulary of {self._vocab_size}; the "
                "tokenizer reports a wrong vocab_size"
            )
        self._bin.write(ids.astype(self._dtype).data)
        for prompt, response in documents:
            self._lengths += (prompt.size + response.size,) if self._one_sequence else (prompt.size, response.size)

    def close(self) -> None:
        self._bin.close()
        np.save(f"{self._part}.npy", np.array(self._lengths, dtype=np.int32))
        for suffix in (".bin", ".npy"):
            os.replace(self._part + suffix, self._path.with_suffix(suffix))


def join_shards(
    shards: Sequence[Path],
    output_prefix: str,
    dtype: np.dtype[np.integer],
    *,
    work_folder: Path | None = None,
    sequences_per_document: int = SEQUENCES_PER_DOCUMENT,
) -> dict[str, str]:
    """Write OUTPUT_PREFIX.bin and .idx from finished shards, in order; both appear by rename, whole.

    Args:
        shards: paths without suffix, as given to `ShardWriter`.
        output_prefix: path of the output without suffix.
        dtype: dtype the shards were written with.
        work_folder: where the files are until they are whole, on the same disk; default the folder of the shards.
        sequences_per_document: 2, or 1 for shards written with `one_sequence`.

    Returns:
        The checksums of both files, by suffix.
    """
    folder = work_folder or shards[0].parent
    bin_part, idx_part = folder / "joined.bin", folder / "joined.idx"
    # Both files are on the disk when they are closed: the caller deletes the shards after this.
    with LargeFile(bin_part) as ids:
        for shard in shards:
            with open(shard.with_suffix(".bin"), "rb", buffering=0) as part:
                shutil.copyfileobj(part, ids, 16 << 20)
    count = sum(len(lengths) for lengths in _lengths(shards))
    documents = count // sequences_per_document
    with LargeFile(idx_part) as out:
        out.write(_MAGIC + struct.pack("<QBQQ", 1, _DTYPE_CODES[dtype], count, documents + 1))
        for lengths in _lengths(shards):
            out.write(lengths.astype("<i4").tobytes())
        offset = 0
        for lengths in _lengths(shards):
            ends = offset + np.cumsum(lengths.astype(np.int64)) * dtype.itemsize
            starts = np.concatenate(([offset], ends[:-1])) if len(ends) else ends
            out.write(starts.astype("<i8").tobytes())
            offset = int(ends[-1]) if len(ends) else offset
        step = 1 << 20
        for first in range(0, documents + 1, step):
            borders = np.arange(first, min(first + step, documents + 1), dtype="<i8") * sequences_per_document
            out.write(borders.tobytes())
    os.replace(bin_part, f"{output_prefix}.bin")
    os.replace(idx_part, f"{output_prefix}.idx")
    return {".bin": ids.checksum, ".idx": out.checksum}


def _lengths(shards: Sequence[Path]) -> Iterator[npt.NDArray[np.int32]]:
    for shard in shards:
        yield np.load(shard.with_suffix(".npy"))
