"""A model folder of this package (`model.weights.save_model`, the trainer's final weights) as a source."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_multiverse.checkpoints.families import FAMILIES
from megatron_multiverse.checkpoints.hf_config import family_for, read_hf_config
from megatron_multiverse.checkpoints.hf_io import SINGLE_FILE, HFReader
from megatron_multiverse.checkpoints.names import Entry, Family, entries
from megatron_multiverse.config import ModelConfig
from megatron_multiverse.errors import CheckpointError, ConfigError


def is_model_folder(folder: str | Path) -> bool:
    """Whether `folder` holds config.json in our form beside model.safetensors."""
    path = Path(folder)
    both = (path / "config.json").is_file() and (path / SINGLE_FILE).is_file()
    return both and "model_type" not in read_hf_config(path)


class ModelFolderSource:
    """config.json (a ModelConfig) and model.safetensors under megatron-core's names.

    Raises:
        CheckpointError: tensors are missing, too many or of the wrong shape.
        ConfigError: no family has the model's biases and norms, or not the expected one.
    """

    def __init__(self, folder: str | Path, family: str | None = None) -> None:
        self.folder = Path(folder)
        self.config = ModelConfig.from_json(self.folder / "config.json")
        if family is not None and family not in FAMILIES:
            raise ConfigError(f"unknown family {family!r}, supported: {', '.join(FAMILIES)}")
        self.family: Family = FAMILIES[family] if family else family_for(self.config)
        self.hf_config: dict[str, Any] | None = None
        self.reader = HFReader(folder)
        self.files = self.reader.files
        self._entries = entries(self.family, self.config)
        for entry in self._entries:
            shape = self.reader.location(entry.mcore).shape
            if shape != entry.shape:
                raise CheckpointError(
                    f"{self.files[0]}: tensor {entry.mcore} has shape {list(shape)}, config.json asks for "
                    f"{list(entry.shape)}"
                )
        extra = sorted(self.reader.names() - {entry.mcore for entry in self._entries})
        if extra:
            raise CheckpointError(f"{self.files[0]}: tensor {extra[0]} is not part of a {self.family.name} model")

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
