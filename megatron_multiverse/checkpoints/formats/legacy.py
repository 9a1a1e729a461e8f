"""Megatron's older format, one torch.save file per rank: `mp_rank_00/model_optim_rng.pt`, `mp_rank_00_001/...`.

A file is first written with room for its tensors, and then filled tensor by tensor; it is read tensor by tensor too.
So memory holds one tensor, not a rank's whole model. (The archive's checksums are not filled in; torch does not check
them.)
"""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from megatron_multiverse.checkpoints.formats.megatron_args import args_from_config
from megatron_multiverse.checkpoints.formats.pickles import load_torch_file, storage_offset
from megatron_multiverse.checkpoints.formats.raw import Location, as_bytes, read_tensor
from megatron_multiverse.checkpoints.names.rules import join, slices
from megatron_multiverse.checkpoints.names.table import Entry, Shape
from megatron_multiverse.checkpoints.protocols import (
    DTypeName,
    Record,
    Source,
    Stream,
    Unit,
    entry_bytes,
    pad_rows,
    target_dtype,
)
from megatron_multiverse.checkpoints.recycled import contiguous
from megatron_multiverse.errors import CheckpointError, first_line
from megatron_multiverse.weight_names import CORE_ATTENTION, extra_state_modules, fused_name, plain_name

logger = logging.getLogger(__name__)

RANK_FOLDER = re.compile(r"mp_rank_(\d{2})(?:_(\d{3}))?$")
FILE_NAMES = ("model_optim_rng.pt", "model_rng.pt")
LAYER = re.compile(r"decoder\.layers\.(\d+)\.")
TransformerImpl = Literal["transformer_engine", "local"]


def is_legacy(folder: Path) -> bool:
    """Whether the folder holds mp_rank_XX folders."""
    return folder.is_dir() and any(RANK_FOLDER.match(p.name) for p in folder.iterdir())


class LegacyReader:
    """Tensors of an mp_rank_XX folder, joined over the tensor-parallel ranks."""

    def __init__(self, folder: Path, trust_pickle: bool = False) -> None:
        self.folder = folder
        ranks: dict[int, dict[int, Path]] = {}
        for path in folder.iterdir():
            if match := RANK_FOLDER.match(path.name):
                ranks.setdefault(int(match[2] or 0), {})[int(match[1])] = _rank_file(path)
        self.tp = max(max(stage) for stage in ranks.values()) + 1
        self.files: list[Path] = []
        self.described_by: list[Path] = []
        self.args: Any = None
        self.places: dict[str, list[Location]] = {}
        first_layer = 0
        for pipeline_rank in range(max(ranks) + 1):
            for tensor_rank in range(self.tp):
                file = ranks.get(pipeline_rank, {}).get(tensor_rank)
                if file is None:
                    raise CheckpointError(
                        f"{folder} has no file of tensor rank {tensor_rank}, pipeline rank {pipeline_rank} "
                        f"(others show {self.tp} x {max(ranks) + 1} ranks): copy the missing mp_rank folder"
                    )
                layers = self._take(file, first_layer, trust_pickle)
            first_layer += layers

    def _take(self, file: Path, first_layer: int, trust_pickle: bool) -> int:
        """Note the places of one file's tensors; returns its number of layers."""
        content = load_torch_file(file, trust_pickle)
        if not isinstance(content, dict) or "model" not in content:
            extra = " (virtual pipeline stages, save without them)" if "model0" in content else ""
            raise CheckpointError(f"{file} has no entry 'model'{extra}: it is no checkpoint of Megatron-LM")
        self.files.append(file)
        self.args = content.get("args", self.args)
        layers = set()
        for name, tensor in content["model"].items():
            if not isinstance(tensor, Tensor):
                continue  # an _extra_state
            if match := LAYER.match(name):
                layers.add(int(match[1]))
                name = f"decoder.layers.{first_layer + int(match[1])}.{name[match.end() :]}"
            self._note(file, plain_name(name), tensor)
        return len(layers)

    def _note(self, file: Path, name: str, tensor: Tensor) -> None:
        if not tensor.is_contiguous():
            raise CheckpointError(f"{file}: tensor {name} is not contiguous, which no Megatron checkpoint is")
        begin = storage_offset(tensor)
        if begin + tensor.nbytes > file.stat().st_size:
            raise CheckpointError(f"{file}: ends before tensor {name} does; it is truncated, copy it again")
        self.places.setdefault(name, []).append(Location(file, begin, tensor.dtype, tuple(tensor.shape)))

    def keys(self) -> set[str]:
        """Names of the model's tensors, local spec."""
        return set(self.places)

    def key(self, entry: Entry) -> str:
        """Key under which the tensor is noted here."""
        return entry.mcore

    def file_of(self, key: str) -> Path:
        """A file that holds a part of the tensor of this name."""
        return self.places[key][0].file

    def _of(self, entry: Entry) -> list[Location]:
        if entry.mcore not in self.places:
            raise CheckpointError(f"{self.folder}: none of the {len(self.files)} files has a tensor {entry.mcore}")
        places = self.places[entry.mcore]
        if len(places) != self.tp:
            raise CheckpointError(f"{self.folder}: {entry.mcore} stands in {len(places)} of {self.tp} tensor ranks")
        return places

    def shape(self, entry: Entry) -> Shape:
        """Shape of the whole tensor."""
        shapes = [place.shape for place in self._of(entry)]
        if entry.rule == "replicated":
            return shapes[0]
        dim = 1 if entry.rule == "row" else 0
        whole = list(shapes[0])
        whole[dim] = sum(shape[dim] for shape in shapes)
        return tuple(whole)

    def dtype(self, entry: Entry) -> torch.dtype:
        """Dtype as stored."""
        return self._of(entry)[0].dtype

    def where(self, entry: Entry) -> Path:
        """The file of tensor rank 0."""
        return self._of(entry)[0].file

    def read(self, entry: Entry) -> Tensor:
        """The whole tensor. Ranks that should hold the same but do not are told of; the first one counts, as it does
        for Megatron itself."""
        places = self._of(entry)
        parts = [read_tensor(place, name=entry.mcore) for place in places]
        if entry.rule == "replicated":
            for place, part in zip(places, parts, strict=True):
                if not torch.equal(part, parts[0]):
                    logger.warning(
                        "%s: tensor %s differs from the one of tensor rank 0, which is taken", place.file, entry.mcore
                    )
        return join(entry.rule, parts)


class LegacyTarget:
    """Writes one file per tensor and pipeline rank. A pipeline stage is one unit."""

    def __init__(
        self,
        source: Source,
        dtype: DTypeName,
        *,
        tp: int,
        pp: int,
        padded_vocab_size: int,
        transformer_impl: TransformerImpl = "transformer_engine",
    ) -> None:
        self.source, self.tp, self.pp, self.padded = source, tp, pp, padded_vocab_size
        self.fused = transformer_impl == "transformer_engine"
        plan = source.entries()
        self.dtypes = {entry.mcore: target_dtype(source, entry, dtype) for entry in plan}
        stages: list[list[Entry]] = [[] for _ in range(pp)]
        per_stage = source.config.num_layers // pp
        for entry in plan:
            first = entry.mcore.startswith("embedding.")
            stages[(0 if first else pp - 1) if entry.layer is None else entry.layer // per_stage].append(entry)
        if pp > 1 and source.config.share_embeddings_and_output_weights:
            stages[-1].append(plan[0])  # the last stage keeps a copy of the tied embedding
        self.units = [Unit(f"stage_{k}", tuple(stage)) for k, stage in enumerate(stages)]
        copies = [(e, self.tp if e.rule == "replicated" else 1) for stage in stages for e in stage]
        self.total_bytes = sum(entry_bytes(e, self.dtypes[e.mcore]) * n for e, n in copies)
        dtype_of_all = self.dtypes[plan[0].mcore]
        self.args = args_from_config(
            source.config, padded_vocab_size=padded_vocab_size, tp=tp, pp=pp, dtype=dtype_of_all
        )

    def write(self, unit: Unit, tensors: Stream, folder: Path) -> Record:
        """Write the files of one stage with room for their tensors, then fill them."""
        stage = self.units.index(unit)
        files = [folder / _rank_name(rank, stage, self.pp) / FILE_NAMES[0] for rank in range(self.tp)]
        for file in files:
            file.parent.mkdir(exist_ok=True)
            self._write_empty(file, unit, stage)
        offsets = [
            {n: storage_offset(t) for n, t in load_torch_file(file)["model"].items() if t is not None} for file in files
        ]
        descriptors = [os.open(file, os.O_WRONLY) for file in files]
        try:
            for entry, tensor in tensors:
                tensor = contiguous(pad_rows(entry, tensor, self.padded), self.dtypes[entry.mcore])
                name = self._name(entry, stage)
                for rank, part in enumerate(slices(entry.rule, tensor, self.tp)):
                    _write_at(descriptors[rank], as_bytes(part), offsets[rank][name])
        finally:
            for descriptor in descriptors:
                os.close(descriptor)
        return {"files": {str(file.relative_to(folder)): file.stat().st_size for file in files}}

    def _name(self, entry: Entry, stage: int) -> str:
        if entry.layer is None:
            tied_copy = entry.mcore.startswith("embedding.") and stage > 0
            return "output_layer.weight" if tied_copy else entry.mcore
        local = entry.layer - stage * (self.source.config.num_layers // self.pp)
        name = entry.mcore.replace(f".layers.{entry.layer}.", f".layers.{local}.", 1)
        return fused_name(name) if self.fused else name

    def _write_empty(self, file: Path, unit: Unit, stage: int) -> None:
        """Write the file of one rank, its tensors without values (their sizes are the same on all ranks)."""
        model: dict[str, Any] = {}
        with FakeTensorMode():
            for entry in unit.entries:
                rows = self.padded if entry.rule == "vocab" else entry.shape[0]
                shape = [rows, *entry.shape[1:]]
                if entry.rule != "replicated":
                    shape[1 if entry.rule == "row" else 0] //= self.tp
                model[self._name(entry, stage)] = torch.empty(shape, dtype=self.dtypes[entry.mcore])
        for layer in range(self.source.config.num_layers // self.pp):
            for module in extra_state_modules(qk_layernorm=False):
                if self.fused or module != CORE_ATTENTION:
                    model[f"decoder.layers.{layer}.{module}._extra_state"] = None
        try:
            with torch.serialization.skip_data(materialize_fake_tensors=True):
                torch.save({"model": model, "args": self.args, "checkpoint_version": 3.0, "iteration": 0}, file)
        except RuntimeError as error:  # torch's writer does not say what the system said
            raise CheckpointError(f"{file} cannot be written ({first_line(error)}): is the disk full?") from error

    def finish(self, records: list[Record], folder: Path) -> None:
        """Nothing spans the files of this format."""


def _rank_file(folder: Path) -> Path:
    for name in FILE_NAMES:
        if (folder / name).is_file():
            return folder / name
    raise CheckpointError(f"{folder} has neither {' nor '.join(FILE_NAMES)}: copy the checkpoint again")


def _rank_name(tensor_rank: int, pipeline_rank: int, pp: int) -> str:
    return f"mp_rank_{tensor_rank:02d}" + (f"_{pipeline_rank:03d}" if pp > 1 else "")


def _write_at(descriptor: int, data: memoryview, offset: int) -> None:
    while data:
        count = os.pwrite(descriptor, data, offset)
        data, offset = data[count:], offset + count
