"""A model folder of this package (`model.weights.save_model`, the trainer's final weights) as a source."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_multiverse.checkpoints.completeness import StoredTensor, check_complete
from megatron_multiverse.checkpoints.formats.hf_safetensors import HFReader
from megatron_multiverse.checkpoints.formats.json_files import read_json_object, read_model_config
from megatron_multiverse.checkpoints.names.registry import find_family
from megatron_multiverse.checkpoints.names.table import Entry, Family, entries
from megatron_multiverse.config import ModelConfig

CONFIG_FILE = "config.json"  # not imported from model.weights: that would load megatron-core for every conversion


def is_model_folder(folder: str | Path) -> bool:
    """Whether config.json in `folder` is a ModelConfig, not a config of Hugging Face."""
    file = Path(folder) / CONFIG_FILE
    if not file.is_file():
        return False
    values = read_json_object(file)
    return "model_type" not in values and "num_layers" in values


class ModelFolderSource:
    """config.json (a ModelConfig) and model.safetensors under megatron-core's names.

    Raises:
        CheckpointError: tensors are missing, too many or of the wrong shape.
        ConfigError: no family has the model's biases and norms, or not the expected one.
    """

    def __init__(self, folder: str | Path, family: str | None = None) -> None:
        self.folder = Path(folder)
        self.config: ModelConfig = read_model_config(self.folder / CONFIG_FILE)
        self.family: Family = find_family(family, self.config)
        self.hf_config: dict[str, Any] | None = None
        self.reader = HFReader(folder)
        self.files = self.reader.files
        self.described_by = [self.folder / CONFIG_FILE, *self.reader.indexes]
        self.asset_folders, self.trained = [self.folder], True
        self._entries = entries(self.family, self.config)
        needed = [
            StoredTensor(entry.mcore, self.files[0], self.reader.location(entry.mcore).shape, entry.shape)
            for entry in self._entries
        ]
        check_complete(needed, self.reader.names(), lambda name: self.files[0], self.family)

    def entries(self) -> list[Entry]:
        """All tensors, in the order of the network."""
        return self._entries

    def where(self, entry: Entry) -> Path:
        """The file of a tensor."""
        return self.reader.location(entry.mcore).file

    def dtype(self, entry: Entry) -> torch.dtype:
        """Dtype on disk."""
        return self.reader.location(entry.mcore).dtype

    def read(self, entry: Entry) -> Tensor:
        """One whole tensor."""
        return self.reader.read(entry.mcore)
