"""What a forward pass attends to. The layers (`layers.py`) ask these params; nothing else says what is seen.

They travel through megatron-core in its argument `packed_seq_params`. `AttentionParams` is the interface;
`LayoutParams` implements it for training, where all tokens are at hand and there is no cache; decoding has its own
(`inference/step/model_forward.py`).
Shapes: s tokens, b batch, h query heads, g key/value heads, d head width.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from megatron_multiverse.errors import ConfigError
from megatron_multiverse.kernels.multiverse_attention import (
    AttentionLayout,
    count_visible_pairs,
    multiverse_attention,
)


@dataclass
class AttentionParams(PackedSeqParams):  # type: ignore[misc]
    """What one forward pass attends to. Subclasses implement `attend`.

    The params also carry the rotary table, since megatron-core's own arguments leave no room for one:
    1. before the pass a hook on the model makes the table from `position_ids` and writes it here (`install_rotary`),
    2. each layer's `SelfAttention.forward` reads it here and keeps it for the length of the call,
    3. its `get_query_key_value_tensors`, which megatron-core calls without the params, rotates q and k by it.
    """

    rotary_table: Tensor | None = field(default=None, repr=False, kw_only=True)
    """Cosines and sines [b, s, d] of the tokens' position ids."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, *, layer_number: int, softmax_scale: float) -> Tensor:
        """Attention of one layer.

        Args:
            query: [s, b, h, d], rotated.
            key: [s, b, g, d], rotated.
            value: [s, b, g, d].
            layer_number: from 1, over all pipeline stages.
            softmax_scale: factor on the scores.

        Returns:
            [s, b, h * d].
        """
        raise NotImplementedError


@dataclass
class LayoutParams(AttentionParams):
    """Attention over the tokens of this very forward pass, seen according to their labels r.

    The first layer makes the backend's plan (the dense backend's is the mask [b, 1, s, s]), all layers share it, and
    it is freed with the layout. So make new LayoutParams for every microbatch, and do not keep them.
    """

    layout: AttentionLayout = field(kw_only=True)
    """Labels, places and tile lists."""
    backend: str = field(default="auto", kw_only=True)
    """A name in `kernels.multiverse_attention.BACKENDS`, or auto."""

    @classmethod
    def from_labels(cls, r: Tensor, *, backend: str = "auto", **rest: Any) -> LayoutParams:
        """For labels r [b, s]; `rest`: other fields of AttentionLayout."""
        return cls(layout=AttentionLayout(r, **rest), backend=backend)

    @classmethod
    def causal(cls, input_ids: Tensor, backend: str = "auto") -> LayoutParams:
        """Plain causal attention over input_ids [b, s]."""
        index = torch.arange(input_ids.shape[1], dtype=torch.int32, device=input_ids.device)
        return cls.from_labels(index.expand(input_ids.shape[0], -1), backend=backend)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, *, layer_number: int, softmax_scale: float) -> Tensor:
        """See AttentionParams.attend. Raises ConfigError if the layout is for other numbers of tokens."""
        want = query.shape[1], query.shape[0], key.shape[0]
        if self.layout.shape != want:
            raise ConfigError(f"the layout of LayoutParams must be for (b, s_q, s_k) = {want}, got {self.layout.shape}")
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        out: Tensor = multiverse_attention(q, k, v, self.layout, softmax_scale=softmax_scale, backend=self.backend)
        return out.permute(2, 0, 1, 3).flatten(2)

    def num_visible_pairs(self) -> Tensor:
        """Number of visible (query, key) pairs over the batch, int64 scalar on the device."""
        assert self.layout.key_r is None
        pairs: Tensor = count_visible_pairs(self.layout.r, self.layout.index)
        return pairs
