"""Fresh weights as a source, so that every rank can draw its own part of the same model, however the model is cut.

megatron-core would draw the weights of each rank by themselves: another model for every other parallel size.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_multiverse.checkpoints.names.registry import find_family
from megatron_multiverse.checkpoints.names.table import Entry, Family, entries
from megatron_multiverse.config import ModelConfig

STD = 0.02
"""Standard deviation of megatron-core's initial weights (init_method_std)."""
_INTO_THE_STREAM = ("linear_proj.weight", "linear_fc2.weight")
"""Weights whose products are added to the residual stream: drawn smaller by sqrt(2 num_layers), as megatron-core's."""


class FreshSource:
    """A `Source` of a model that was never trained. Each tensor depends on the seed and its name alone.

    Args:
        config: shape of the model.
        seed: of the weights.
        device: where they are drawn; a GPU draws other ones than the CPU, and faster.

    Raises:
        ConfigError: no family has the model's biases and norms.
    """

    def __init__(self, config: ModelConfig, seed: int, device: str | torch.device = "cpu") -> None:
        self.folder = Path("fresh weights")
        self.config = config
        self.family: Family = find_family(None, config)
        self.hf_config: dict[str, Any] | None = None
        self.files: list[Path] = []
        self.described_by: list[Path] = []
        self.asset_folders: list[Path] = []
        self.trained = False
        self._seed, self._device = seed, torch.device(device)

    def entries(self) -> list[Entry]:
        """All tensors, in the order of the network."""
        return entries(self.family, self.config)

    def where(self, entry: Entry) -> Path:
        """They are in no file."""
        return self.folder

    def dtype(self, entry: Entry) -> torch.dtype:
        """They are drawn in float32."""
        return torch.float32

    def read(self, entry: Entry) -> Tensor:
        """One whole tensor: norms are 1, biases 0, matrices normal."""
        if "norm" in entry.mcore:
            return torch.ones(entry.shape, device=self._device)
        if entry.mcore.endswith(".bias"):
            return torch.zeros(entry.shape, device=self._device)
        std = STD / (2 * self.config.num_layers) ** 0.5 if entry.mcore.endswith(_INTO_THE_STREAM) else STD
        digest = hashlib.sha256(f"{self._seed} {entry.mcore}".encode()).digest()
        generator = torch.Generator(self._device).manual_seed(int.from_bytes(digest[:7], "big"))
        return torch.empty(entry.shape, device=self._device).normal_(0.0, std, generator=generator)
