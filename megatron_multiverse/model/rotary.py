"""Rotary embedding by explicit position ids.

megatron-core builds its rotary table from the sequence length alone. In a Multiverse sample positions are not
0..s-1, so the model is built without megatron-core's rotary embedding. Before every forward pass a hook makes the
table of cosines and sines from `position_ids`, once for all layers; `AttentionParams` says how it reaches them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from megatron_multiverse.config import RopeScaling
from megatron_multiverse.errors import ConfigError
from megatron_multiverse.kernels.rope import (
    inverse_frequencies,
    llama3_frequencies,
    rope_table,
)
from megatron_multiverse.model.attention import AttentionParams


class PositionIdRotary:
    """Makes rotary tables.

    Args:
        dim: head width.
        base: rotary base.
        dtype: dtype of the angles (float32, float64 for float64 models); never a half type.
        scaling: change of the frequencies for long contexts, or None.
    """

    def __init__(
        self, dim: int, base: float, dtype: torch.dtype = torch.float32, scaling: RopeScaling | None = None
    ) -> None:
        self.dim, self.base, self.dtype, self.scaling = dim, base, dtype, scaling
        self._inv_freq: Tensor | None = None

    def table(self, position_ids: Tensor) -> Tensor:
        """Cosines and sines [b, s, dim] of position_ids [b, s], on their device."""
        if self._inv_freq is None or self._inv_freq.device != position_ids.device:
            frequencies = inverse_frequencies(self.dim, self.base, position_ids.device, self.dtype)
            self._inv_freq = scaled_frequencies(frequencies, self.scaling)
        table: Tensor = rope_table(position_ids, self._inv_freq)
        return table


def scaled_frequencies(frequencies: Tensor, scaling: RopeScaling | None) -> Tensor:
    """The frequencies [dim / 2] for a longer context; unchanged without scaling."""
    if scaling is None:
        return frequencies
    if scaling.rope_type == "linear":
        return frequencies / scaling.factor
    stretched: Tensor = llama3_frequencies(
        frequencies,
        factor=scaling.factor,
        low_freq_factor=scaling.low_freq_factor,
        high_freq_factor=scaling.high_freq_factor,
        original_length=scaling.original_max_position_embeddings,
    )
    return stretched


def install_rotary(model: nn.Module, rotary: PositionIdRotary) -> None:
    """Give the AttentionParams of every forward pass of `model` the table of its position ids."""

    def hand_over(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = kwargs.get("position_ids", args[1] if len(args) > 1 else None)
        params = kwargs.get("packed_seq_params")
        if ids is None:
            raise ConfigError("position_ids are missing: pass position_ids [b, s] to the model's forward")
        if isinstance(params, AttentionParams):  # anything else is refused, with an explanation, by the layers
            params.rotary_table = rotary.table(ids)

    model.register_forward_pre_hook(hand_over, with_kwargs=True)
