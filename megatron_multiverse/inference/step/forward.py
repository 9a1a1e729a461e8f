"""The forward pass of decoding: the same model as megatron-core's GPTModel, as few calls as a layer needs.

A decode step has few tokens, so what GPTModel's modules do around each product costs more than the products.
`PagedForward` calls the products themselves, each with its norm, activation or residual (`kernels/fused_linear`), on
the very weights of the model. It has static shapes for a given number of tokens, which is what a CUDA graph needs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from megatron_multiverse.inference.step.kv_store import KVStore
from megatron_multiverse.inference.step.model_ranks import ModelRanks
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
    """A GPTModel's forward pass over the paged cache, or this rank's part of it.

    The weights are shared with the model: what changes them in place changes this.

    Args:
        model: as `model.build_gpt_model` makes it; see `runs`.
        ranks: those that hold the model between them; default: megatron-core's.
    """

    def __init__(self, model: nn.Module, ranks: ModelRanks | None = None) -> None:
        config: Any = model.config
        self.ranks = ranks or ModelRanks.current()
        self.eps = config.layernorm_epsilon
        self.hidden_size = config.hidden_size
        self.num_groups = config.num_query_groups // self.ranks.tensor_size
        self.softmax_scale = config.kv_channels**-0.5
        rotary = model.position_id_rotary
        assert isinstance(rotary, PositionIdRotary)
        self.rotary = rotary
        state = weight_state(model)
        # The first stage has the embedding, the last one the final norm and the output layer.
        self.embedding = state.get("embedding.word_embeddings.weight")
        decoder: Any = model.decoder
        self.layers = [_layer(state, index) for index in range(len(decoder.layers))]
        self.final_norm = state.get("decoder.final_layernorm.weight")
        self.output = state.get("output_layer.weight", self.embedding)

    @staticmethod
    def runs(model: nn.Module) -> bool:
        """Whether this can stand in for the model: one that `build_gpt_model` made, not in FP8, whose tensor parallel
        ranks have key/value heads of their own."""
        if not isinstance(getattr(model, "position_id_rotary", None), PositionIdRotary):
            return False
        config: Any = model.config
        return not config.fp8 and config.num_query_groups % config.tensor_model_parallel_size == 0

    def __call__(self, step: StepTensors, store: KVStore) -> Tensor | None:
        """Run the model once.

        Returns:
            The logits [s, vocab] asked for, the padding of the vocabulary included; None on all pipeline stages but the
            last.
        """
        ranks = self.ranks
        if ranks.is_first_stage:
            assert self.embedding is not None
            x = ranks.embed(step.ids, self.embedding)
        else:
            x = ranks.receive_hidden(len(step.ids), self.layers[0].qkv.weight, self.hidden_size)
        table = self.rotary.table(step.positions[None])
        for layer in self.layers:
            x = self._add(self._attend(x, layer, table, step, store), layer.proj, x)
            hidden = norm_swiglu(x, layer.mlp_norm, self.eps, layer.fc1.weight, layer.fc1.bias)
            x = self._add(hidden, layer.fc2, x)
        if not ranks.is_last_stage:
            ranks.send_hidden(x)
            return None
        assert self.final_norm is not None and self.output is not None
        logits = norm_linear(x.index_select(0, step.logit_tokens), self.final_norm, self.eps, self.output)
        return ranks.join_vocab(logits)

    def _add(self, x: Tensor, linear: _Linear, residual: Tensor) -> Tensor:
        """The residual stream after a product whose sum is cut over the tensor parallel ranks: one of them brings what
        is there once."""
        if self.ranks.tensor_rank == 0:
            return self.ranks.sum(linear_add(x, linear.weight, residual, linear.bias))
        return self.ranks.sum(linear_add(x, linear.weight))

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
