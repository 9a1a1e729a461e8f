"""Rotary embedding by explicit position ids, in the place of megatron-core's `rotary_pos_emb`.

megatron-core builds its rotary table from the sequence length alone. In a Multiverse sample positions are not
0..s-1, so this module makes the table from `position_ids`, which a forward pre-hook hands over.
The table is an argument of every layer, so recomputation and pipeline stages see the right one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from megatron_multiverse.config import RopeScaling
from megatron_multiverse.errors import ConfigError
from megatron_multiverse.kernels.rope import inverse_frequencies, llama3_frequencies, rope_angles


class PositionIdRotary(nn.Module):
    """Drop-in for `GPTModel.rotary_pos_emb`.

    Args:
        dim: head width.
        base: rotary base.
        dtype: dtype of the angles (float32, float64 for float64 models); never a half type.
        scaling: change of the frequencies for long contexts, or None.
    """

    def __init__(
        self, dim: int, base: float, dtype: torch.dtype = torch.float32, scaling: RopeScaling | None = None
    ) -> None:
        super().__init__()
        self.dim, self.base, self.dtype, self.scaling = dim, base, dtype, scaling
        self._position_ids: Tensor | None = None
        self._inv_freq: Tensor | None = None  # not a buffer: model.to(bfloat16) must not round it

    def get_rotary_seq_len(self, *args: Any, **kwargs: Any) -> int:
        """megatron-core asks for a length; the ids make it irrelevant."""
        return 0

    def set_position_ids(self, position_ids: Tensor) -> None:
        """Take the ids [b, s] of the coming forward pass."""
        self._position_ids = position_ids

    def forward(self, max_seq_len: int, offset: int = 0, packed_seq: bool = False, cp_group: Any = None) -> Tensor:
        """Angles [s, b, 1, dim] for the ids of this forward pass."""
        if self._position_ids is None:
            raise ConfigError("position_ids are missing: pass position_ids [b, s] to the model's forward")
        ids, self._position_ids = self._position_ids, None
        if self._inv_freq is None or self._inv_freq.device != ids.device:
            frequencies = inverse_frequencies(self.dim, self.base, ids.device, self.dtype)
            self._inv_freq = scaled_frequencies(frequencies, self.scaling)
        angles: Tensor = rope_angles(ids, self._inv_freq)
        return angles


def scaled_frequencies(frequencies: Tensor, scaling: RopeScaling | None) -> Tensor:
    """The frequencies for a stretched context."""
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
    """Replace `model.rotary_pos_emb` and hand it the position ids before every forward pass."""
    model.rotary_pos_emb = rotary

    def hand_over(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = kwargs["position_ids"] if "position_ids" in kwargs else args[1]
        rotary.set_position_ids(ids)

    model.register_forward_pre_hook(hand_over, with_kwargs=True)
