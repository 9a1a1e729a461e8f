"""megatron-core's `torch_dist` format (torch.distributed.checkpoint files), read and written tensor by tensor.

A folder holds `.metadata` (which slice of which tensor lies where), `metadata.json`, `common.pt` (args and the like;
from megatron-core 0.19 on they lie among the tensors instead) and `.distcp` files: torch.save archives of one slice
each, one after the other. All layers of a parameter form one tensor [layers, ...]. megatron-core itself, of either
kind, opens what is written here, at any tensor and pipeline parallel size.
"""

from __future__ import annotations

import io
import json
import math
import pickle
import uuid
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.utils import _create_file_view

from megatron_multiverse.checkpoints.formats.megatron_args import args_from_config
from megatron_multiverse.checkpoints.formats.pickles import load_metadata, load_torch_file, storage_offset
from megatron_multiverse.checkpoints.formats.raw import Location, as_bytes, read_tensor
from megatron_multiverse.checkpoints.names.rules import slices
from megatron_multiverse.checkpoints.names.table import Entry, Shape, dist_key
from megatron_multiverse.checkpoints.protocols import (
    DTypeName,
    Record,
    Source,
    Stream,
    Unit,
    entry_bytes,
    group,
    pad_rows,
    target_dtype,
)
from megatron_multiverse.checkpoints.recycled import contiguous, empty
from megatron_multiverse.errors import CheckpointError
from megatron_multiverse.large_files import LargeFile
from megatron_multiverse.weight_names import FINAL_EXTRA_STATE, extra_state_modules, fused_name, layer_extra_state

COMMON_STATE = "common_state/shard_0_1"
METADATA_JSON = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}


class TorchDistReader:
    """Tensors of a torch_dist folder, assembled from whatever slices they were saved in."""

    def __init__(self, folder: Path, trust_pickle: bool = False) -> None:
        self.folder = folder
        if not (folder / ".metadata").is_file():
            raise CheckpointError(f"{folder} has no .metadata: it is no complete torch_dist checkpoint")
        self.metadata = load_metadata(folder / ".metadata", trust_pickle)
        storage: dict[MetadataIndex, _StorageInfo] = self.metadata.storage_data
        self.files = sorted({folder / info.relative_path for info in storage.values()})
        ends: dict[str, int] = defaultdict(int)
        for info in storage.values():
            ends[info.relative_path] = max(ends[info.relative_path], info.offset + info.length)
        for file in self.files:
            if not file.is_file():
                raise CheckpointError(f"{file} is missing, .metadata names it for {self._first_in(file.name)}")
            if file.stat().st_size < ends[file.name]:
                raise CheckpointError(
                    f"{file} has {file.stat().st_size} bytes, .metadata asks for {ends[file.name]} "
                    f"({self._first_in(file.name, file.stat().st_size)} is cut off): copy it again"
                )
        self.common = self._read_common(trust_pickle)
        small = (folder / name for name in (".metadata", "metadata.json", "common.pt"))
        self.described_by = [file for file in small if file.is_file()]

    def _read_common(self, trust_pickle: bool) -> dict[str, Any]:
        """What is no tensor: a file of its own, or from megatron-core 0.19 on an object among the tensors."""
        file = self.folder / "common.pt"
        common: dict[str, Any]
        if file.is_file():
            common = load_torch_file(file, trust_pickle)
            return common
        info = self.metadata.storage_data.get(MetadataIndex(COMMON_STATE))
        if info is None:
            raise CheckpointError(f"{self.folder} has no common.pt: it is no complete torch_dist checkpoint")
        file = self.folder / info.relative_path
        with open(file, "rb") as stream:
            part = _create_file_view(stream, info.offset, info.length)
            (common,) = load_torch_file(file, trust_pickle, part=part)
        return common

    def _first_in(self, name: str, after: int = 0) -> str:
        infos: dict[MetadataIndex, _StorageInfo] = self.metadata.storage_data
        return next(i.fqn for i, s in infos.items() if s.relative_path == name and s.offset + s.length > after)

    def keys(self) -> set[str]:
        """Keys of the model's tensors (optimizer state left out)."""
        tensors = {k for k, v in self.metadata.state_dict_metadata.items() if isinstance(v, TensorStorageMetadata)}
        return {key for key in tensors if not key.startswith(("optimizer.", "chained_"))}

    def file_of(self, key: str) -> Path:
        """A file that holds a part of the tensor under this key."""
        return self.folder / self._info(key, self._tensor(key).chunks[0]).relative_path

    def _stored(self, entry: Entry, prefix: str = "") -> tuple[str, bool]:
        """Key of the tensor and whether its first dimension is the layer."""
        stored = self.metadata.state_dict_metadata
        for key, stacked in ((dist_key(entry), entry.layer is not None), (fused_name(entry.mcore), False)):
            if prefix + key in stored:
                return prefix + key, stacked
        key = prefix + dist_key(entry)
        raise CheckpointError(f"{self.folder}: .metadata has no tensor {key}, needed for {entry.mcore}")

    def key(self, entry: Entry) -> str:
        """Key under which the tensor is stored."""
        return self._stored(entry)[0]

    def _tensor(self, key: str) -> TensorStorageMetadata:
        stored = self.metadata.state_dict_metadata[key]
        if not isinstance(stored, TensorStorageMetadata):
            raise CheckpointError(f"{self.folder}: {key} is no tensor in .metadata")
        return stored

    def shape(self, entry: Entry, prefix: str = "") -> Shape:
        """Shape of the whole tensor as stored; `prefix` as in `read`."""
        key, stacked = self._stored(entry, prefix)
        return tuple(self._tensor(key).size)[stacked:]

    def dtype(self, entry: Entry) -> torch.dtype:
        """Dtype as stored."""
        key, _ = self._stored(entry)
        return self._tensor(key).properties.dtype

    def where(self, entry: Entry) -> Path:
        """The file with the first slice of the tensor."""
        key, stacked = self._stored(entry)
        chunk = next(iter(self._overlapping(key, entry.layer if stacked else None)))
        return self.folder / self._info(key, chunk).relative_path

    def read(self, entry: Entry, prefix: str = "") -> Tensor:
        """The whole tensor as stored.

        Args:
            entry: which one.
            prefix: what stands before the key of the weight where the optimizer's state of it is meant, e.g.
                "optimizer.state.exp_avg.".

        Raises:
            CheckpointError: it is not there, or its slices are damaged or do not cover it.
        """
        key, stacked = self._stored(entry, prefix)
        layer = entry.layer if stacked else None
        shape = self.shape(entry, prefix)
        whole = empty(shape, self._tensor(key).properties.dtype)
        covered = 0
        for chunk in self._overlapping(key, layer):
            sizes, offsets = tuple(chunk.sizes)[stacked:], tuple(chunk.offsets)[stacked:]
            place = whole[tuple(slice(o, o + n) for o, n in zip(offsets, sizes, strict=True))]
            # Whole rows are read into their place; joining them later would be a copy more.
            part = self._read_chunk(key, chunk, layer, place if place.is_contiguous() else None)
            if part is not place:
                place.copy_(part)
            covered += part.numel()
        if covered != math.prod(shape):
            raise CheckpointError(
                f"{self.folder}: .metadata covers {covered} of {math.prod(shape)} elements of {key}"
                + ("" if layer is None else f", layer {layer}")
            )
        return whole

    def _overlapping(self, key: str, layer: int | None) -> Iterator[ChunkStorageMetadata]:
        for chunk in self._tensor(key).chunks:
            if layer is None or chunk.offsets[0] <= layer < chunk.offsets[0] + chunk.sizes[0]:
                yield chunk

    def _info(self, key: str, chunk: ChunkStorageMetadata) -> _StorageInfo:
        info: _StorageInfo = self.metadata.storage_data[MetadataIndex(key, chunk.offsets)]
        return info

    def _read_chunk(self, key: str, chunk: ChunkStorageMetadata, layer: int | None, out: Tensor | None) -> Tensor:
        """One slice, in `out` if given; of a slice of several layers only the layer asked for."""
        info = self._info(key, chunk)
        file = self.folder / info.relative_path
        with open(file, "rb") as stream:
            view = _create_file_view(stream, info.offset, info.length)
            meta: Tensor = load_torch_file(file, part=view)
        sizes = tuple(chunk.sizes)
        if meta.numel() != math.prod(sizes) or not meta.is_contiguous():
            raise CheckpointError(f"{file}: tensor {key} is stored as {list(meta.shape)}, .metadata says {list(sizes)}")
        out = out if out is not None and out.dtype == meta.dtype else None
        start = info.offset + storage_offset(meta)
        if layer is None:
            return read_tensor(Location(file, start, meta.dtype, sizes), name=key, out=out)
        start += (layer - chunk.offsets[0]) * math.prod(sizes[1:]) * meta.itemsize
        return read_tensor(Location(file, start, meta.dtype, sizes[1:]), name=key, out=out)


class TorchDistTarget:
    """Writes a torch_dist folder, slices cut for `tp` ranks, in files of about `shard_size` bytes."""

    def __init__(
        self, source: Source, dtype: DTypeName, shard_size: int, *, tp: int, pp: int, padded_vocab_size: int
    ) -> None:
        self.source, self.tp, self.pp, self.padded = source, tp, pp, padded_vocab_size
        plan = source.entries()
        self.dtypes = {entry.mcore: target_dtype(source, entry, dtype) for entry in plan}
        sizes = [entry_bytes(entry, self.dtypes[entry.mcore]) for entry in plan]
        groups = group(plan, sizes, shard_size)
        self.units = [Unit(f"__0_{k}.distcp", tuple(g)) for k, g in enumerate(groups)]
        self.total_bytes = sum(sizes) + 4096 * tp * len(plan)
        first = self.dtypes[plan[0].mcore]
        self.args = args_from_config(source.config, padded_vocab_size=padded_vocab_size, tp=tp, pp=pp, dtype=first)

    def write(self, unit: Unit, tensors: Stream, folder: Path) -> Record:
        """Write one .distcp file."""
        file, stored = folder / unit.name, list[list[Any]]()
        crc = torch.serialization.get_crc32_options()
        torch.serialization.set_crc32_options(False)  # nobody checks them on loading, and they halve the speed
        try:
            with LargeFile(file) as stream:
                for entry, tensor in tensors:
                    tensor = contiguous(pad_rows(entry, tensor, self.padded), self.dtypes[entry.mcore])
                    stored += self._write_slices(stream, entry, tensor)
        finally:
            torch.serialization.set_crc32_options(crc)
        sizes, checksums = {unit.name: file.stat().st_size}, {unit.name: stream.checksum}
        return {"files": sizes, "checksums": checksums, "slices": stored}

    def _write_slices(self, stream: LargeFile, entry: Entry, tensor: Tensor) -> Iterator[list[Any]]:
        """Write a tensor; yields [key, dtype, whole shape, offsets, sizes, position, length] of each slice."""
        layers, lead = self.source.config.num_layers, () if entry.layer is None else (entry.layer,)
        shape = (*((layers,) if lead else ()), *tensor.shape)
        for offsets, part in _placed_slices(entry, tensor, self.tp):
            place, sizes = (*lead, *offsets), (*((1,) if lead else ()), *part.shape)
            start = stream.tell()
            # torch.save writes the whole memory that a tensor is a view of: hand it one that ends where the part ends.
            own = torch.frombuffer(as_bytes(part), dtype=part.dtype) if part.numel() else part
            torch.save(own.reshape(sizes), cast(BinaryIO, stream))
            dtype = str(tensor.dtype).removeprefix("torch.")
            yield [dist_key(entry), dtype, shape, place, sizes, start, stream.tell() - start]

    def finish(self, records: list[Record], folder: Path) -> None:
        """Write .metadata, metadata.json and common.pt."""
        tensors: dict[str, Any] = {}
        storage: dict[MetadataIndex, _StorageInfo] = {}
        for unit, record in zip(self.units, records, strict=True):
            for key, dtype, shape, place, sizes, start, length in record["slices"]:
                if key not in tensors:
                    properties = TensorProperties(dtype=getattr(torch, dtype))
                    tensors[key] = TensorStorageMetadata(properties, torch.Size(shape), [])
                tensors[key].chunks.append(ChunkStorageMetadata(torch.Size(place), torch.Size(sizes)))
                storage[MetadataIndex(key, torch.Size(place))] = _StorageInfo(unit.name, start, length)
        self._write_extra_states(folder, tensors, storage)
        meta = StorageMeta(checkpoint_id=".", save_id=str(uuid.uuid4()))
        metadata = Metadata(tensors, None, storage, meta, version="1.0.0")
        _dump(metadata, folder / ".metadata")
        (folder / "metadata.json").write_text(json.dumps(METADATA_JSON), encoding="utf-8")
        with open(folder / "common.pt", "wb") as stream:  # an error of torch's own writer would not say what is wrong
            torch.save({"args": self.args, "checkpoint_version": 3.0, "iteration": 0}, stream)

    def _write_extra_states(self, folder: Path, tensors: dict[str, Any], storage: dict[Any, Any]) -> None:
        """Empty extra states, which megatron-core asks for when loading, whichever spec it uses."""
        empty, layers = io.BytesIO(), self.source.config.num_layers
        torch.save([None], empty)
        name, length = "__0_extra.distcp", empty.tell()
        modules = extra_state_modules(qk_layernorm=self.source.config.qk_layernorm)
        keys = [f"{layer_extra_state(m)}/shard_{layer}_{layers}" for m in modules for layer in range(layers)]
        with open(folder / name, "wb") as stream:
            for key in (*keys, f"{FINAL_EXTRA_STATE}/shard_0_1"):
                tensors[key] = BytesStorageMetadata()
                storage[MetadataIndex(key)] = _StorageInfo(name, stream.tell(), length)
                stream.write(empty.getbuffer())


def _placed_slices(entry: Entry, tensor: Tensor, tp: int) -> Iterator[tuple[Shape, Tensor]]:
    """Offsets and values of the slices megatron-core would save; gate and up are cut one after the other."""
    if entry.rule == "gate_up":
        half = len(tensor) // 2
        for start, part in ((0, tensor[:half]), (half, tensor[half:])):
            rows = half // tp
            for rank, piece in enumerate(part.chunk(tp)):
                yield (start + rank * rows, *([0] * (tensor.ndim - 1))), piece
        return
    parts = slices(entry.rule, tensor, tp)[: 1 if entry.rule == "replicated" else tp]
    dim = 1 if entry.rule == "row" else 0
    for rank, piece in enumerate(parts):
        offsets = [0] * tensor.ndim
        offsets[dim] = rank * piece.shape[dim]
        yield tuple(offsets), piece


def _dump(metadata: Metadata, file: Path) -> None:
    with open(file, "wb") as stream:
        pickle.dump(metadata, stream)
