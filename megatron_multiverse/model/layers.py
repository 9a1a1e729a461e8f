"""The parts of megatron-core's transformer layer that are ours, in the order in which a layer runs them.

A norm for the local layers, the rotary table by position id, self-attention that rotates by it, core attention that
asks the params of the forward pass what is seen, and the residual addition. `layer_specs.py` puts them in place.
Shapes: s tokens, b batch, h query heads, g key/value heads, d head width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.attention import SelfAttention as McoreSelfAttention
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megatron_multiverse.config import RopeScaling
from megatron_multiverse.errors import ConfigError
from megatron_multiverse.kernels.fused_linear import rms_norm
from megatron_multiverse.kernels.rope import (
    inverse_frequencies,
    llama3_frequencies,
    rope_table,
    rotate,
    split_and_rotate,
)
from megatron_multiverse.model.attention import AttentionParams
from megatron_multiverse.model.cpu import device_neutral_cuda


class RMSNorm(nn.Module):
    """Root-mean-square norm with a learned scale, computed in float32 or better.

    megatron-core's own torch norm refuses sequence parallelism; the mark on the weight makes megatron-core
    sum its gradient over the tensor parallel ranks.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension of x."""
        normed: Tensor = rms_norm(x, self.weight, self.eps)
        return normed


class PositionIdRotary:
    """Makes rotary tables from explicit position ids.

    megatron-core builds its table from the sequence length alone. In a Multiverse sample positions are not 0..s-1, so
    the model is built without megatron-core's rotary embedding.

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
        table: Tensor = rope_table(position_ids, self.frequencies(position_ids.device))
        return table

    def frequencies(self, device: torch.device) -> Tensor:
        """Angle per position of each pair, [dim / 2]."""
        if self._inv_freq is None or self._inv_freq.device != device:
            frequencies = inverse_frequencies(self.dim, self.base, device, self.dtype)
            self._inv_freq = scaled_frequencies(frequencies, self.scaling)
        return self._inv_freq


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
    """Give the AttentionParams of every forward pass of `model` the table of its position ids, made once for all
    layers. `model.position_id_rotary` names the rotary for whoever runs the weights without that pass."""
    model.position_id_rotary = rotary  # type: ignore[assignment]

    def hand_over(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = kwargs.get("position_ids", args[1] if len(args) > 1 else None)
        params = kwargs.get("packed_seq_params")
        if ids is None:
            raise ConfigError("position_ids are missing: pass position_ids [b, s] to the model's forward")
        if isinstance(params, AttentionParams):  # anything else is refused, with an explanation, by the layers
            params.rotary_table = rotary.table(ids)

    model.register_forward_pre_hook(hand_over, with_kwargs=True)


class SelfAttention(McoreSelfAttention):  # type: ignore[misc]
    """megatron-core's self-attention, rotated by the table of the pass; `packed_seq_params` must be AttentionParams.

    megatron-core would split the mixed projection and then rotate q and k in two unfused steps. Here one kernel splits
    and rotates. Where q and k have norms (Qwen3), which come between the two, one kernel rotates both.
    """

    _rotary_table: Tensor | None = None

    def forward(
        self, *args: Any, packed_seq_params: PackedSeqParams | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """As megatron-core's; activation recompute calls it again, with the same params.

        Raises:
            ConfigError: the params are none of ours or have no rotary table, or another rotation is asked for.
        """
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
            with device_neutral_cuda(self.linear_qkv.weight.device):
                query, key, value = map(_autocast, super().get_query_key_value_tensors(*args, **kwargs))
            return *rotate(query, key, table), value
        mixed, _ = super().get_query_key_value_tensors(*args, **kwargs | {"split_qkv": False})
        return split_and_rotate(_autocast(mixed), table)


class CoreAttention(MegatronModule):  # type: ignore[misc]
    """`core_attention` of megatron-core's self-attention: asks the AttentionParams of the forward pass."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        softmax_scale: float | None = None,
        **_: Any,
    ) -> None:
        super().__init__(config=config)
        refuse_unsupported_settings(config)
        self.layer_number = layer_number
        self.softmax_scale = config.kv_channels**-0.5 if softmax_scale is None else softmax_scale

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """See AttentionParams.attend. Raises ConfigError for a mask or a bias: the params say what is seen."""
        if attention_bias is not None:
            raise ConfigError("Multiverse attention takes no attention_bias: leave it out")
        params = require_attention_params(packed_seq_params, attention_mask)
        return params.attend(query, key, value, layer_number=self.layer_number, softmax_scale=self.softmax_scale)


def residual_add(training: bool, fused: bool) -> Callable[[tuple[Tensor, Tensor | None], Tensor, float], Tensor]:
    """megatron-core's `bias_dropout_add` hook; returns f((x, bias), residual, dropout) -> residual + x + bias.

    No dropout, and the residual stream keeps its own precision. megatron-core's version casts the stream to the dtype
    of the branch; under autocast that would round it to bf16 in every layer although its weights are float32.
    """

    def add(x_with_bias: tuple[Tensor, Tensor | None], residual: Tensor, dropout: float) -> Tensor:
        x, bias = x_with_bias
        return residual + (x if bias is None else x + bias)

    return add


def require_attention_params(
    packed_seq_params: PackedSeqParams | None, attention_mask: Tensor | None = None
) -> AttentionParams:
    """The params of the forward pass. Raises ConfigError if they are of another type, or a mask comes beside them."""
    if isinstance(packed_seq_params, AttentionParams) and attention_mask is None:
        return packed_seq_params
    raise ConfigError(
        "call the model with attention_mask=None and packed_seq_params=LayoutParams.from_labels(r) "
        f"(LayoutParams.causal for plain text); got {type(packed_seq_params).__name__} and "
        f"attention_mask={'None' if attention_mask is None else 'a tensor'}"
    )


def refuse_unsupported_settings(config: TransformerConfig) -> None:
    """Raise ConfigError for settings of megatron-core that our layers would ignore.

    megatron-core's own default for both dropouts is 0.1.
    """
    refused = {
        "hidden_dropout": config.hidden_dropout,
        "attention_dropout": config.attention_dropout,
        "window_size": getattr(config, "window_size", None),
        "softmax_type": getattr(config, "softmax_type", "vanilla") != "vanilla",
        "qk_clip": getattr(config, "qk_clip", False),
        "attention_output_gate": getattr(config, "attention_output_gate", False),
        "multi_latent_attention": getattr(config, "multi_latent_attention", False),
    }
    if wrong := [name for name, value in refused.items() if value]:
        given = ", ".join(f"{name} {getattr(config, name)!r}" for name in wrong)
        raise ConfigError(
            f"Multiverse attention and its layers have no {', '.join(wrong)} (given: {given}): set the dropouts to 0.0 "
            "and leave the others unset"
        )


def _autocast(x: Tensor) -> Tensor:
    """x in the dtype of autocast, if autocast is on.

    megatron-core's local linear layers add a float32 bias to their bf16 product; without this attention would run in
    float32.
    """
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x
