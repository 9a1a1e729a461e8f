"""Hugging Face weights: sharded safetensors, read tensor by tensor and written as a stream.

Reading goes through the file headers; the index says which files there are and is checked against them. Writing puts
the header first (all shapes are known) and then one tensor after the other, so memory holds one tensor and never a
shard. The index is rebuilt from the headers of the files on disk.
"""

from __future__ import annotations

import json
import logging
import struct
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_multiverse.checkpoints.formats.json_files import read_json_object, refuse_lfs_pointer
from megatron_multiverse.checkpoints.formats.raw import Location, as_bytes, read_tensor
from megatron_multiverse.checkpoints.names.table import Shape
from megatron_multiverse.checkpoints.protocols import byte_size
from megatron_multiverse.checkpoints.recycled import contiguous
from megatron_multiverse.errors import CheckpointError
from megatron_multiverse.large_files import LargeFile

logger = logging.getLogger(__name__)

METADATA = "__metadata__"
INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
ADAPTER_FILE = "adapter_config.json"
OTHER_LAYOUTS = {
    "pytorch_model*.bin": "pickled weights: load them with a recent transformers and write them with save_pretrained",
    "model-*-of-*.safetensors": "shards whose index is missing: download that too",
    "model.*.safetensors": "a variant: load it with from_pretrained(variant=...) and write it with save_pretrained",
    "consolidated*": "the layout of the model's authors: download the one of transformers from the same place",
    "*.gguf": "GGUF weights: download those that they were made from",
}
"""Files that hold weights in a way that is not read here, and what to do."""
FILE_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
FILE_DTYPE_NAMES = {dtype: name for name, dtype in FILE_DTYPES.items()}


def read_header(file: Path) -> dict[str, Location]:
    """Names and places of the tensors in one safetensors file.

    Raises:
        CheckpointError: no safetensors file, cut short, or of a dtype that no dense model has.
    """
    size = file.stat().st_size
    with open(file, "rb") as stream:
        head = stream.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else size
        raw = stream.read(min(length, size))
    if 8 + length > size:
        refuse_lfs_pointer(file)
        raise CheckpointError(f"{file}: no complete safetensors header ({size} bytes in all); download it again")
    try:
        header: dict[str, dict[str, Any]] = json.loads(raw)
    except ValueError as error:
        raise CheckpointError(f"{file}: the safetensors header is damaged ({error}); download it again") from error
    try:
        return {name: _location(file, name, entry, 8 + length) for name, entry in header.items() if name != METADATA}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{file}: the safetensors header is damaged ({error!r}); download it again") from error


def _location(file: Path, name: str, entry: Mapping[str, Any], start: int) -> Location:
    """Where a tensor lies, from its entry in the header and the first byte after the header."""
    begin, end = entry["data_offsets"]
    if entry["dtype"] not in FILE_DTYPES:
        kind = "a quantised weight, dequantise the model first" if "8" in entry["dtype"] else "no weight, take it out"
        raise CheckpointError(
            f"{file}: tensor {name} has dtype {entry['dtype']}, supported: {', '.join(FILE_DTYPES)}; it is {kind}"
        )
    dtype, shape, size = FILE_DTYPES[entry["dtype"]], tuple(entry["shape"]), file.stat().st_size
    if begin < 0 or end - begin != byte_size(dtype, shape) or start + end > size:
        raise CheckpointError(
            f"{file}: tensor {name} should end at byte {start + end}, the file has {size}; "
            "it is truncated, copy or download it again"
        )
    return Location(file, start + begin, dtype, shape)


class HFReader:
    """The tensors of a Hugging Face folder by name, read on demand.

    Raises:
        CheckpointError: no weights, a shard that the index names is missing, or index and files disagree.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.locations: dict[str, Location] = {}
        self.files = self._files()
        self.indexes = [index for index in [self.folder / INDEX_FILE] if index.is_file()]
        for file in self.files:
            for name, place in read_header(file).items():
                if name in self.locations:
                    raise CheckpointError(f"tensor {name} stands in {self.locations[name].file} and again in {file}")
                self.locations[name] = place

    def _files(self) -> list[Path]:
        """The files that transformers would read: the single one, whatever an index beside it says, else the index's.

        transformers itself leaves an old index behind when it saves a model that now fits into one file.
        """
        if (self.folder / ADAPTER_FILE).is_file():
            raise CheckpointError(
                f"{self.folder} has an {ADAPTER_FILE}: with peft installed transformers adds that adapter to the "
                "weights. Merge it (peft's merge_and_unload) and save the model, or move the adapter's files away"
            )
        index, single = self.folder / INDEX_FILE, self.folder / SINGLE_FILE
        if single.is_file():
            if index.is_file():
                logger.warning("%s: taking %s, as transformers does, not %s", self.folder, single.name, index.name)
            return [single]
        if not index.is_file():
            raise CheckpointError(self._no_weights())
        named = self._weight_map(index)
        files = [self.folder / name for name in sorted(set(named.values()))]
        for file in files:
            if not file.is_file():
                lost = [tensor for tensor, name in named.items() if name == file.name]
                raise CheckpointError(
                    f"{file} is missing, {index.name} names it for {len(lost)} tensors, e.g. {lost[0]}: "
                    "download the missing shard"
                )
        found = {name for file in files for name in read_header(file)}
        absent = sorted(named.keys() - found)
        if absent:
            raise CheckpointError(f"{index} names {absent[0]} in {named[absent[0]]}, but that file does not hold it")
        return files

    def _weight_map(self, index: Path) -> dict[str, str]:
        named = read_json_object(index).get("weight_map")
        if not isinstance(named, dict) or not named or not all(type(name) is str for name in named.values()):
            raise CheckpointError(f"{index} is damaged (it has no weight_map of file names): download it again")
        return named

    def _no_weights(self) -> str:
        message = f"{self.folder} has neither {SINGLE_FILE} nor {INDEX_FILE}"
        for pattern, advice in OTHER_LAYOUTS.items():
            if found := sorted(self.folder.glob(pattern)):
                return f"{message}, but {found[0].name}: {advice}"
        return f"{message}: a folder with safetensors weights is needed"

    def names(self) -> set[str]:
        """Names of all tensors."""
        return set(self.locations)

    def location(self, name: str) -> Location:
        """Place of a tensor. Raises CheckpointError for an unknown name."""
        if name not in self.locations:
            raise CheckpointError(f"{self.folder} has no tensor {name} in any of its {len(self.files)} files")
        return self.locations[name]

    def read(self, name: str, out: Tensor | None = None) -> Tensor:
        """One tensor, in memory of its own or in `out` (see `read_tensor`)."""
        return read_tensor(self.location(name), name=name, out=out)


def write_safetensors(
    file: Path, places: Mapping[str, tuple[torch.dtype, Shape]], tensors: Iterable[tuple[str, Tensor]]
) -> str:
    """Write one safetensors file as a stream; returns its checksum.

    Args:
        file: where to.
        places: dtype and shape of the file's tensors, in order.
        tensors: the same names in the same order with their values, in any dtype.

    Raises:
        CheckpointError: other tensors come than announced.
    """
    header: dict[str, Any] = {METADATA: {"format": "pt"}}
    end = 0
    for name, (dtype, shape) in places.items():
        begin, end = end, end + byte_size(dtype, shape)
        header[name] = {"dtype": FILE_DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    expected = iter(places.items())
    with LargeFile(file) as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        for name, tensor in tensors:
            wanted, (dtype, shape) = next(expected, ("", (tensor.dtype, ())))
            if (name, tuple(tensor.shape)) != (wanted, shape):
                raise CheckpointError(f"{file}: {name} {list(tensor.shape)} is not the tensor that belongs here")
            stream.write(as_bytes(contiguous(tensor, dtype)))
    if (left := next(expected, None)) is not None:
        raise CheckpointError(f"{file}: {left[0]} was not written")
    return stream.checksum


def write_index(folder: Path, expected: Sequence[str]) -> None:
    """Write the index of the safetensors files that lie in `folder`; one file alone needs none.

    Raises:
        CheckpointError: an expected tensor is missing, there is one too many, or one stands in two files.
    """
    weight_map: dict[str, str] = {}
    total = 0
    for file in sorted(folder.glob("*.safetensors")):
        for name, place in read_header(file).items():
            if name in weight_map:
                raise CheckpointError(f"tensor {name} stands in {weight_map[name]} and in {file.name}")
            weight_map[name] = file.name
            total += byte_size(place.dtype, place.shape)
    different = sorted(set(expected) ^ weight_map.keys())
    if different:
        what = "missing from" if different[0] in expected else "too many in"
        raise CheckpointError(f"{len(different)} tensors {what} {folder}, e.g. {different[0]}")
    if set(weight_map.values()) != {SINGLE_FILE}:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
