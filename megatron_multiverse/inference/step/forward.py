"""The forward pass of decoding: the same model as megatron-core's GPTModel, as few calls as a layer needs.

A decode step has few tokens, so what GPTModel's modules do around each product costs more than the products.
`PagedForward` calls the products themselves, each with its norm, activation or residual (`kernels/fused_linear`), on
the very weights of the model. It has static shapes for a given number of tokens, which is what a CUDA graph needs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from megatron_multiverse.inference.step.kv_store import KVStore
from megatron_multiverse.inference.step.tensors import StepTensors
from megatron_multiverse.kernels.fused_linear import linear_add, norm_linear, norm_swiglu
from megatron_multiverse.kernels.kv_write import write_kv
from megatron_multiverse.model.layers import PositionIdRotary
from megatron_multiverse.model.weights import weight_state


@dataclass(frozen=True, kw_only=True)
class _Linear:
    weight: Tensor
    bias: Tensor | None


@dataclass(frozen=True, kw_only=True)
class _Layer:
    """The weights of one transformer layer; the shapes are megatron-core's."""

    index: int
    attention_norm: Tensor
    qkv: _Linear
    query_norm: Tensor | None
    key_norm: Tensor | None
    proj: _Linear
    mlp_norm: Tensor
    fc1: _Linear
    fc2: _Linear


class PagedForward:
    """A GPTModel's forward pass over the paged cache.

    The weights are shared with the model: what changes them in place changes this.

    Args:
        model: whole, not cut over ranks, as `model.build_gpt_model` makes it; see `runs`.
    """

    def __init__(self, model: nn.Module) -> None:
        config: Any = model.config
        self.eps = config.layernorm_epsilon
        self.num_groups = config.num_query_groups
        self.softmax_scale = config.kv_channels**-0.5
        rotary = model.position_id_rotary
        assert isinstance(rotary, PositionIdRotary)
        self.rotary = rotary
        state = weight_state(model)
        self.embedding = state["embedding.word_embeddings.weight"]
        self.layers = [_layer(state, index) for index in range(config.num_layers)]
        self.final_norm = state["decoder.final_layernorm.weight"]
        self.output = state.get("output_layer.weight", self.embedding)

    @staticmethod
    def runs(model: nn.Module) -> bool:
        """Whether this can stand in for the model: one that `build_gpt_model` made, on one rank, not in FP8."""
        if not isinstance(getattr(model, "position_id_rotary", None), PositionIdRotary):
            return False
        config: Any = model.config
        return bool(config.tensor_model_parallel_size == config.pipeline_model_parallel_size == 1 and not config.fp8)

    def __call__(self, step: StepTensors, store: KVStore) -> Tensor:
        """Run the model once; returns the logits [s, vocab] asked for, the padding of the vocabulary included."""
        x = F.embedding(step.ids, self.embedding)
        table = self.rotary.table(step.positions[None])
        for layer in self.layers:
            x = linear_add(self._attend(x, layer, table, step, store), layer.proj.weight, x, layer.proj.bias)
            hidden = norm_swiglu(x, layer.mlp_norm, self.eps, layer.fc1.weight, layer.fc1.bias)
            x = linear_add(hidden, layer.fc2.weight, x, layer.fc2.bias)
        return norm_linear(x.index_select(0, step.logit_tokens), self.final_norm, self.eps, self.output)

    def _attend(self, x: Tensor, layer: _Layer, table: Tensor, step: StepTensors, store: KVStore) -> Tensor:
        """Attention of one layer over the cache: x [n, hidden] -> [n, heads * head dim]."""
        mixed = norm_linear(x, layer.attention_norm, self.eps, layer.qkv.weight, layer.qkv.bias)
        query = write_kv(
            mixed.view(len(x), self.num_groups, -1),
            table,
            *store.flat[layer.index],
            step.write_slots,
            step.write_tokens,
            query_norm=layer.query_norm,
            key_norm=layer.key_norm,
            eps=self.eps,
        )
        out = step.attention(query, store.keys[layer.index], store.values[layer.index], self.softmax_scale)
        return out.flatten(1)


def _layer(state: dict[str, Tensor], index: int) -> _Layer:
    prefix = f"decoder.layers.{index}."

    def linear(name: str) -> _Linear:
        return _Linear(weight=state[f"{prefix}{name}.weight"], bias=state.get(f"{prefix}{name}.bias"))

    return _Layer(
        index=index,
        attention_norm=state[f"{prefix}input_layernorm.weight"],
        qkv=linear("self_attention.linear_qkv"),
        query_norm=state.get(f"{prefix}self_attention.q_layernorm.weight"),
        key_norm=state.get(f"{prefix}self_attention.k_layernorm.weight"),
        proj=linear("self_attention.linear_proj"),
        mlp_norm=state[f"{prefix}pre_mlp_layernorm.weight"],
        fc1=linear("mlp.linear_fc1"),
        fc2=linear("mlp.linear_fc2"),
    )
