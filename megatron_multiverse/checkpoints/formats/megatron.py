"""A Megatron checkpoint as a source, in either of its formats: torch_dist or mp_rank_XX files.

The folder may be the one given to Megatron's --save (it names its newest checkpoint in
latest_checkpointed_iteration.txt) or one checkpoint in it. The model's shape comes, in this order, from --model-config,
from conversion.json (written by this converter), from model_config.json (written by this trainer), and from the
`args` that Megatron-LM puts into its checkpoints.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_multiverse.checkpoints.completeness import StoredTensor, check_complete
from megatron_multiverse.checkpoints.formats.hf_config import hf_config_to_model_config
from megatron_multiverse.checkpoints.formats.legacy import LegacyReader, is_legacy
from megatron_multiverse.checkpoints.formats.megatron_args import config_from_args
from megatron_multiverse.checkpoints.formats.torch_dist import TorchDistReader
from megatron_multiverse.checkpoints.names.registry import find_family
from megatron_multiverse.checkpoints.names.table import Entry, Family, entries
from megatron_multiverse.checkpoints.run_files import MODEL_CONFIG_FILE, POINTER_FILE, RECORD_FILE, iteration_folder
from megatron_multiverse.config import ModelConfig
from megatron_multiverse.config.strict import dataclass_from_mapping
from megatron_multiverse.errors import CheckpointError, ConfigError


def is_megatron(folder: str | Path) -> bool:
    """Whether the folder is a Megatron checkpoint, or the folder of a run that has one."""
    path = Path(folder)
    return (path / POINTER_FILE).is_file() or _is_one_checkpoint(path)


def _is_one_checkpoint(path: Path) -> bool:
    return (path / ".metadata").is_file() or (path / "metadata.json").is_file() or is_legacy(path)


def checkpoint_folder(folder: str | Path) -> Path:
    """The newest checkpoint of a run's folder, or the folder itself if it is a checkpoint.

    Args:
        folder: one of the two, see `is_megatron`.

    Raises:
        CheckpointError: the pointer file names a checkpoint that is not there.
    """
    path = Path(folder)
    if _is_one_checkpoint(path):
        return path
    pointer = path / POINTER_FILE
    text = pointer.read_text().strip()
    inner = path / (iteration_folder(int(text)) if text.isdigit() else text)
    if not inner.is_dir():
        raise CheckpointError(f"{pointer} names {text!r}, but {inner} does not exist: name a checkpoint that does")
    return inner


class McoreSource:
    """A megatron-core checkpoint.

    Args:
        folder: see above; `is_megatron` must hold.
        family: name of the family; default the recorded one, or the one with the model's biases and norms.
        config: a model_config.json or Hugging Face config.json with the model's shape; default see above.
        vocab_size: real rows of the vocabulary; further rows are padding and dropped. Default: as recorded, else all.
        trust_pickle: load pickles without restrictions.

    Raises:
        CheckpointError: files or tensors are missing, too many or damaged.
        ConfigError: the model is not supported, or its shape is unknown.
    """

    def __init__(
        self,
        folder: str | Path,
        family: str | None = None,
        config: str | Path | None = None,
        vocab_size: int | None = None,
        trust_pickle: bool = False,
    ) -> None:
        self.folder = Path(folder)
        inner = checkpoint_folder(folder)
        self.reader: TorchDistReader | LegacyReader
        if is_legacy(inner):
            self.reader = LegacyReader(inner, trust_pickle)
            args = self.reader.args
        else:
            self.reader = TorchDistReader(inner, trust_pickle)
            args = self.reader.common.get("args")
        self.files = self.reader.files
        record = _first_json(RECORD_FILE, inner, inner.parent)
        self.hf_config: dict[str, Any] | None = record.get("hf_config")
        stored = _model_config(inner, Path(config) if config else None, record, args)
        self.family: Family = find_family(family or record.get("family"), stored)
        rows = vocab_size or record.get("vocab_size") or stored.vocab_size
        self.config: ModelConfig = dataclasses.replace(stored, vocab_size=rows)
        self._entries = entries(self.family, self.config)
        self._check()

    def _check(self) -> None:
        """Every tensor of the name table is there, and nothing else; the vocabulary may have rows of padding."""
        needed = []
        for entry in self._entries:
            shape, wanted = self.reader.shape(entry), entry.shape
            if entry.rule == "vocab":
                wanted = (max(shape[0], wanted[0]), *wanted[1:])
            needed.append(StoredTensor(self.reader.key(entry), self.reader.where(entry), shape, wanted))
        present = self.reader.keys()
        if self.config.share_embeddings_and_output_weights:
            present.discard("output_layer.weight")  # the copy that the last pipeline stage keeps
        check_complete(needed, present, self.reader.file_of, self.family)

    def entries(self) -> list[Entry]:
        """All tensors, in the order of the network."""
        return self._entries

    def where(self, entry: Entry) -> Path:
        """A file that holds a part of the tensor."""
        return self.reader.where(entry)

    def dtype(self, entry: Entry) -> torch.dtype:
        """Dtype on disk."""
        return self.reader.dtype(entry)

    def read(self, entry: Entry) -> Tensor:
        """One whole tensor, vocabulary padding cut off."""
        return self.reader.read(entry)[: entry.shape[0]]


def _first_json(name: str, *folders: Path) -> dict[str, Any]:
    """The first such file in the folders; empty if there is none."""
    for folder in folders:
        file = folder / name
        if file.is_file():
            try:
                values: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
            except ValueError as error:
                raise CheckpointError(f"{file} is not valid JSON ({error})") from error
            return values
    return {}


def _model_config(inner: Path, given: Path | None, record: dict[str, Any], args: Any) -> ModelConfig:
    """The shape as stored, padding rows included where the file knows of them."""
    if given is not None:
        values = _first_json(given.name, given.parent) if given.is_file() else _first_json("config.json", given)
        if not values:
            raise ConfigError(f"--model-config {given} is neither a file nor a folder with a config.json")
        if "model_type" in values:
            return hf_config_to_model_config(values)
        return dataclass_from_mapping(ModelConfig, values, where=str(given))
    if record:
        return dataclass_from_mapping(ModelConfig, record["model_config"], where=RECORD_FILE)
    for folder in (inner, inner.parent):
        if (folder / MODEL_CONFIG_FILE).is_file():
            return ModelConfig.from_json(folder / MODEL_CONFIG_FILE)
    if args is not None:
        return config_from_args(args, where=str(inner))
    raise ConfigError(
        f"{inner} does not say what model it holds (no {RECORD_FILE}, no {MODEL_CONFIG_FILE}, no args): give "
        "--model-config with a model_config.json or the config.json of the Hugging Face model"
    )
