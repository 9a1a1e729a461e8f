"""Self-attention of both layer specs: megatron-core's, rotated by the table of the forward pass.

megatron-core would split the mixed projection and then rotate q and k in two unfused steps. Here one kernel splits and
rotates. Where q and k have norms (Qwen3), which come between splitting and rotating, one kernel rotates both.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.attention import SelfAttention as McoreSelfAttention
from megatron.core.transformer.identity_op import IdentityOp
from torch import Tensor

from megatron_multiverse.errors import ConfigError
from megatron_multiverse.kernels.rope import rotate, split_and_rotate
from megatron_multiverse.model.attention import require_attention_params


class SelfAttention(McoreSelfAttention):  # type: ignore[misc]
    """megatron-core's self-attention; `packed_seq_params` must be the AttentionParams of the pass."""

    _rotary_table: Tensor | None = None

    def forward(
        self, *args: Any, packed_seq_params: PackedSeqParams | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """As megatron-core's; activation recompute calls it again, with the same params."""
        params = require_attention_params(packed_seq_params)
        if params.rotary_table is None:
            raise ConfigError(
                "the params have no rotary_table: call the whole model, whose forward hook makes it (build_gpt_model "
                "installs it, install_rotary does for a model of yours), or set it to PositionIdRotary(...).table(ids)"
            )
        if kwargs.get("rotary_pos_emb") is not None:
            raise ConfigError(
                "these layers rotate by position ids; a rotary_pos_emb would rotate once more: build GPTModel with "
                "position_embedding_type='none'"
            )
        self._rotary_table = params.rotary_table
        try:
            out: tuple[Tensor, Tensor] = super().forward(*args, packed_seq_params=packed_seq_params, **kwargs)
        finally:
            self._rotary_table = None  # the table must not outlive the pass
        return out

    def get_query_key_value_tensors(self, *args: Any, split_qkv: bool = True, **kwargs: Any) -> Any:
        """q [s, b, h, d] and k [s, b, g, d], both rotated, and v [s, b, g, d], for megatron-core's forward."""
        table = self._rotary_table
        assert table is not None and split_qkv
        between = [norm for norm in (self.q_layernorm, self.k_layernorm) if not isinstance(norm, IdentityOp | None)]
        # With fewer groups than tensor parallel ranks megatron-core gathers the projection and takes its part.
        if between or self.config.num_query_groups < self.world_size:
            query, key, value = map(_autocast, super().get_query_key_value_tensors(*args, **kwargs))
            return *rotate(query, key, table), value
        mixed, _ = super().get_query_key_value_tensors(*args, **kwargs | {"split_qkv": False})
        return split_and_rotate(_autocast(mixed), table)


def _autocast(x: Tensor) -> Tensor:
    """x in the dtype of autocast, if autocast is on.

    megatron-core's local linear layers add a float32 bias to their bf16 product; without this attention would run in
    float32.
    """
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x
