"""A Hugging Face folder as source and as target."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_multiverse.checkpoints.completeness import StoredTensor, check_complete
from megatron_multiverse.checkpoints.formats.hf_config import (
    family_of,
    hf_config_to_model_config,
    hf_rotary,
    model_config_to_hf,
    read_hf_config,
)
from megatron_multiverse.checkpoints.formats.hf_safetensors import SINGLE_FILE, HFReader, write_index, write_safetensors
from megatron_multiverse.checkpoints.formats.raw import Location, read_tensor
from megatron_multiverse.checkpoints.names.rules import merge, split
from megatron_multiverse.checkpoints.names.table import Entry, Family, entries
from megatron_multiverse.checkpoints.protocols import (
    DTypeName,
    Record,
    Source,
    Stream,
    Unit,
    byte_size,
    entry_bytes,
    group,
    target_dtype,
)
from megatron_multiverse.checkpoints.recycled import empty
from megatron_multiverse.config import ModelConfig
from megatron_multiverse.errors import CheckpointError, ConfigError

HEAD, BLOCK_BYTES = "lm_head.weight", 1 << 26


class HFSource:
    """A folder of safetensors with config.json.

    Args:
        folder: the folder.
        family: name of the family that the user expects; anything else in config.json is refused.

    Raises:
        ConfigError: the architecture is not supported or not the expected one.
        CheckpointError: files or tensors are missing, too many or damaged.
    """

    def __init__(self, folder: str | Path, family: str | None = None) -> None:
        self.folder = Path(folder)
        self.hf_config: dict[str, Any] | None = read_hf_config(folder)
        self.family: Family = family_of(self.hf_config)
        if family not in (None, self.family.name):
            raise ConfigError(f"{folder} holds a {self.family.name} model, --family says {family}")
        self.config: ModelConfig = hf_config_to_model_config(self.hf_config)
        self.reader = HFReader(folder)
        self.files = self.reader.files
        self.described_by = [self.folder / "config.json", *self.reader.indexes]
        self.asset_folders, self.trained = [self.folder], False
        self._entries = entries(self.family, self.config)
        self._check()

    def _check(self) -> None:
        """Every tensor of the name table is there, and nothing else but what older transformers wrote."""
        shapes = {name: shape for entry in self._entries for name, shape in entry.hf}
        places = {name: self.reader.location(name) for name in shapes}
        needed = [StoredTensor(name, places[name].file, places[name].shape, shapes[name]) for name in shapes]
        present = {name for name in self.reader.names() if not name.endswith("rotary_emb.inv_freq")}
        if self.config.share_embeddings_and_output_weights:
            present.discard(HEAD)  # a copy of the tied embedding, or `read` refuses it
        check_complete(needed, present, lambda name: self.reader.location(name).file, self.family)

    def entries(self) -> list[Entry]:
        """All tensors, in the order of the network."""
        return self._entries

    def where(self, entry: Entry) -> Path:
        """The file of the entry's first tensor."""
        return self.reader.location(entry.hf[0][0]).file

    def dtype(self, entry: Entry) -> torch.dtype:
        """Dtype on disk. Raises CheckpointError if the parts of one tensor differ."""
        places = [self.reader.location(name) for name, _ in entry.hf]
        if len({place.dtype for place in places}) > 1:
            raise CheckpointError(
                f"{places[0].file}: {', '.join(n for n, _ in entry.hf)} become one tensor, but have different dtypes: "
                "choose one for all tensors with --dtype float32, bf16 or float16"
            )
        return places[0].dtype

    def read(self, entry: Entry) -> Tensor:
        """One whole megatron-core tensor. A tied embedding is compared with a copy in lm_head, if there is one.

        Raises:
            CheckpointError: it cannot be read, or the copy differs.
        """
        names = [name for name, _ in entry.hf]
        dtypes = {self.reader.location(name).dtype for name in names}
        if entry.rule == "gate_up" and len(dtypes) == 1:  # read into their places: joining them later is a copy more
            tensor = empty(entry.shape, dtypes.pop())
            for name, half in zip(names, tensor.chunk(2), strict=True):
                self.reader.read(name, half)
        else:
            tensor = merge(entry, [self.reader.read(name) for name in names], self.config)
        if entry.rule == "vocab" and self.config.share_embeddings_and_output_weights and HEAD in self.reader.names():
            self._check_head(tensor)
        return tensor

    def _check_head(self, embedding: Tensor) -> None:
        """Raise CheckpointError unless lm_head holds the tied embedding. It is read in pieces: it may be large."""
        place = self.reader.location(HEAD)
        rows = max(1, BLOCK_BYTES // max(1, byte_size(place.dtype, place.shape[1:])))
        same = place.shape == tuple(embedding.shape)
        for start in range(0, len(embedding) if same else 0, rows):
            mine = embedding[start : start + rows]
            offset = place.offset + byte_size(place.dtype, (start, *place.shape[1:]))
            theirs = read_tensor(Location(place.file, offset, place.dtype, tuple(mine.shape)), name=HEAD)
            same = same and torch.equal(mine, theirs.to(mine.dtype))
        if not same:
            raise CheckpointError(
                f"{place.file}: {HEAD} differs from the embedding, but config.json says that they are tied "
                "(tie_word_embeddings true). If the model has a head of its own set that to false; if not, remove "
                f"{HEAD} from the file"
            )


class HFTarget:
    """Writes safetensors shards of at most `shard_size` bytes, their index and config.json."""

    def __init__(self, source: Source, dtype: DTypeName, shard_size: int) -> None:
        self.source = source
        plan = source.entries()
        self.dtypes = {entry.mcore: target_dtype(source, entry, dtype) for entry in plan}
        sizes = [entry_bytes(entry, self.dtypes[entry.mcore]) for entry in plan]
        groups = list(group(plan, sizes, shard_size))
        names = [f"model-{k:05d}-of-{len(groups):05d}.safetensors" for k in range(1, len(groups) + 1)]
        self.units = [
            Unit(name if len(groups) > 1 else SINGLE_FILE, tuple(g)) for name, g in zip(names, groups, strict=True)
        ]
        self.total_bytes = sum(sizes)

    def write(self, unit: Unit, tensors: Stream, folder: Path) -> Record:
        """Write one shard."""
        file = folder / unit.name
        places = {name: (self.dtypes[entry.mcore], shape) for entry in unit.entries for name, shape in entry.hf}
        checksum = write_safetensors(file, places, self._parts(tensors))
        return {"files": {unit.name: file.stat().st_size}, "checksums": {unit.name: checksum}}

    def _parts(self, tensors: Stream) -> Iterator[tuple[str, Tensor]]:
        for entry, tensor in tensors:
            yield from zip((n for n, _ in entry.hf), split(entry, tensor, self.source.config), strict=True)

    def finish(self, records: list[Record], folder: Path) -> None:
        """Write the index, rebuilt from the files, and config.json."""
        write_index(folder, [name for unit in self.units for entry in unit.entries for name, _ in entry.hf])
        values = self.hf_config()
        (folder / "config.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")

    def hf_config(self) -> dict[str, Any]:
        """The original config.json if the model still has its shape, else a fresh one."""
        source = self.source
        dtype = str(self.dtypes[source.entries()[0].mcore]).removeprefix("torch.")
        original = source.hf_config
        if original is not None:
            resized = {**original, "vocab_size": source.config.vocab_size}
            if hf_config_to_model_config(resized) == source.config:
                # transformers 4 does not read rope_parameters, which transformers 5 writes alone.
                rotary = hf_rotary(source.config) if original.get("rope_parameters") else {}
                dtypes = [key for key in ("dtype", "torch_dtype") if key in original] or ["torch_dtype"]
                return {**resized, **rotary, **dict.fromkeys(dtypes, dtype)}
        return model_config_to_hf(source.config, source.family, dtype=dtype)
