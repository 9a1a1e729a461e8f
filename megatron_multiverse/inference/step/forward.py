"""The forward pass of decoding: what it reads, and the same model as megatron-core's GPTModel in few calls.

`StepTensors` is the plan of a step on the device, `KVStore` what the cache holds. A decode step has few tokens, so what
GPTModel's modules do around each product costs more than the products. `PagedForward` calls the products themselves,
each with its norm, activation or residual (`kernels/fused_linear`), on the very weights of the model. It has static
shapes for a given number of tokens, which is what a CUDA graph needs. `model_forward.py` calls any other model.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from megatron_multiverse.inference.step.model_ranks import ModelRanks
from megatron_multiverse.inference.step.plan import Ints, StepPlan
from megatron_multiverse.kernels.decode_step import begin_step, known_ids
from megatron_multiverse.kernels.fused_linear import linear, linear_add, linear_add_norm, linear_swiglu, norm, rms_norm
from megatron_multiverse.kernels.kv_copy import copy_slots
from megatron_multiverse.kernels.kv_write import linear_write_kv, write_kv
from megatron_multiverse.kernels.tree_decode import Attention, TreeDecode
from megatron_multiverse.model.layers import PositionIdRotary
from megatron_multiverse.model.weights import weight_state


@dataclass(frozen=True, eq=False)
class StepTensors:
    """One step's tokens, where their keys and values go, and how they attend."""

    ids: Tensor
    """int64 [n]."""
    positions: Tensor
    """int64 [n]."""
    logit_tokens: Tensor
    """int64 [s + t], the tokens whose logits are asked for: those of the sampled rows, then the scored ones."""
    write_slots: Tensor
    """int64 [m]."""
    write_tokens: Tensor | None
    """int64 [m]; None where slot i receives token i."""
    attention: Attention
    """(query [n, heads, dim], keys and values [pages, page size, kv heads, dim], scale) -> [n, heads, dim]."""
    sources: Tensor | None = None
    """int64 [n], where `ids` does not know a token: which of `last_tokens` it is; else -1. None: it knows all."""
    last_tokens: Tensor | None = None
    """int64, what the step before drew."""

    @classmethod
    def upload(cls, plan: StepPlan, device: torch.device, last_tokens: Tensor) -> StepTensors:
        """Bring a plan to the device; `last_tokens` are those that the previous step drew."""

        def up(array: npt.NDArray[np.generic]) -> Tensor:
            return torch.from_numpy(array).to(device)

        ids, last = up(plan.ids), plan.borders[1:][plan.sample] - 1
        slots, tokens = plan.write_slots, None
        if device.type == "cpu" and len(slots) == len(plan.ids):  # each token has one slot
            slots = np.empty_like(slots)
            slots[plan.write_tokens] = plan.write_slots
        else:
            tokens = up(plan.write_tokens)
        return cls(
            ids=ids if plan.sources.max(initial=-1) < 0 else known_ids(ids, up(plan.sources), last_tokens),
            positions=up(plan.positions),
            logit_tokens=up(np.concatenate((last, plan.scored)) if len(plan.scored) else last),
            write_slots=up(slots),
            write_tokens=tokens,
            attention=TreeDecode(plan.pages, plan.lengths, plan.borders),
        )


class KVStore:
    """Keys and values ``[layers, pages + 1, page_size, kv heads, head dim]``; nobody owns the last page.

    Args:
        num_pages: pages that can be owned.
        page_size: tokens per page.
        num_layers: layers of this rank's stage.
        num_kv_heads: key/value heads of this rank.
        head_dim: width of one head.
        first_layer: number of the stage's first layer, from 1.
        dtype: type of the cache, that of the model's activations.
        device: where the cache lives.
    """

    def __init__(
        self,
        num_pages: int,
        page_size: int,
        *,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        first_layer: int = 1,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        shape = (num_layers, num_pages + 1, page_size, num_kv_heads, head_dim)
        both = torch.zeros((2, *shape), dtype=dtype, device=device)
        self.keys, self.values = both
        self._slots = both.flatten(2, 3).flatten(0, 1)
        self.first_layer = first_layer
        self.flat = [(k.flatten(0, 1), v.flatten(0, 1)) for k, v in zip(self.keys, self.values, strict=True)]
        """The same tensors, layer by layer, as (keys, values) ``[slots, kv heads, head dim]``."""

    @classmethod
    def for_model(cls, model: nn.Module, num_pages: int, page_size: int) -> KVStore:
        """A store for the part of a model that this rank holds.

        Args:
            model: megatron-core's GPTModel, or anything whose `config` names num_layers, num_query_groups and
                kv_channels and which is not cut over ranks.
            num_pages: pages that can be owned.
            page_size: tokens per page.
        """
        first_layer, num_layers, kv_heads = _part_of(model)
        weight, config = next(model.parameters()), cast(Any, model.config)
        return cls(
            num_pages,
            page_size,
            num_layers=num_layers,
            num_kv_heads=kv_heads,
            head_dim=config.kv_channels,
            first_layer=first_layer,
            dtype=weight.dtype,
            device=weight.device,
        )

    @staticmethod
    def page_bytes(model: nn.Module, page_size: int) -> int:
        """Bytes of a page, keys and values of all layers that this rank holds, in a store `for_model`."""
        _, num_layers, kv_heads = _part_of(model)
        config: Any = model.config
        return 2 * num_layers * page_size * kv_heads * config.kv_channels * next(model.parameters()).dtype.itemsize

    def copy(self, copies: Ints) -> None:
        """Copy slots [c, 2] (from, to) in all layers; all are read before any is written. A GPU is not waited for."""
        pairs = torch.empty((2, len(copies)), dtype=torch.int64, pin_memory=self.keys.is_cuda)
        pairs.numpy()[:] = copies.T
        source, target = pairs.to(self.keys.device, non_blocking=True).unbind()
        copy_slots(self._slots, source, target)

    def poison(self, pages: Ints) -> None:
        """Fill pages with NaN, so that a read of a freed page shows in the logits."""
        index = torch.from_numpy(pages).to(self.keys.device)
        for cached in (self.keys, self.values):
            cached.index_fill_(1, index, float("nan"))


def _part_of(model: nn.Module) -> tuple[int, int, int]:
    """Of this rank's part of a model: the number of its first layer, from 1; its layers; its key/value heads."""
    if layers := getattr(getattr(model, "decoder", None), "layers", None):
        return layers[0].layer_number, len(layers), layers[0].self_attention.num_query_groups_per_partition
    config: Any = model.config
    return 1, config.num_layers, config.num_query_groups


@dataclass(frozen=True, kw_only=True)
class _Linear:
    weight: Tensor
    bias: Tensor | None
    scale: Tensor | None
    """Of a weight in FP8."""

    def __call__(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias, self.scale)

    def without_bias(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, scale=self.scale)


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
        round_as_trained: see `EngineConfig.round_as_trained`. It is what the local layers do, but for norms of queries
            and keys on a GPU; TransformerEngine's layers round less often, only their residual stream is like it.
    """

    def __init__(self, model: nn.Module, ranks: ModelRanks | None = None, *, round_as_trained: bool = False) -> None:
        config: Any = model.config
        self.round_as_trained = round_as_trained
        self.ranks = ranks or ModelRanks.current()
        self.eps = config.layernorm_epsilon
        self.hidden_size = config.hidden_size
        self.num_groups = config.num_query_groups // self.ranks.tensor_size
        self.num_heads = config.num_attention_heads // self.ranks.tensor_size
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

    @property
    def num_product_weights(self) -> int:
        """Weights that every token is multiplied by, but for the output layer's."""
        products = [(layer.qkv, layer.proj, layer.fc1, layer.fc2) for layer in self.layers]
        return sum(product.weight.numel() for each in products for product in each)

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
        is_whole = ranks.is_first_stage and ranks.tensor_size == 1
        ids, table, x = begin_step(
            step.ids,
            step.sources,
            step.last_tokens,
            step.positions,
            self.rotary.frequencies(step.positions.device),
            self.embedding if is_whole else None,
        )
        if x is None and ranks.is_first_stage:
            assert self.embedding is not None
            x = ranks.embed(ids, self.embedding)
        elif x is None:
            x = ranks.receive_hidden(len(ids), self.layers[0].qkv.weight, self.hidden_size)
        following = [layer.attention_norm for layer in self.layers[1:]]
        normed: Tensor | None = self._norm(x, self.layers[0].attention_norm)
        for layer, following_norm in itertools.zip_longest(self.layers, following):
            assert normed is not None
            mixed = self._attend(normed, layer, table, step, store)
            x, normed = self._add(mixed, layer.proj, x, layer.mlp_norm, turn=0)
            assert normed is not None
            hidden = self._swiglu(normed, layer.fc1)
            x, normed = self._add(hidden, layer.fc2, x, following_norm, turn=1)
        if not ranks.is_last_stage:
            ranks.send_hidden(x)
            return None
        assert self.final_norm is not None and self.output is not None
        last = self._norm(x.index_select(0, step.logit_tokens), self.final_norm)
        return ranks.join_vocab(linear(last, self.output))

    def _add(
        self, x: Tensor, into: _Linear, residual: Tensor, norm_weight: Tensor | None, *, turn: int
    ) -> tuple[Tensor, Tensor | None]:
        """The residual stream after a product whose sum is cut over the tensor parallel ranks, and its norm if one is
        asked for.

        Args:
            turn: see `sum_norm_push`. The last sum of a step has no norm and goes another way, so the turns alternate.
        """
        if self.round_as_trained:
            product = self.ranks.sum(into.without_bias(x))
            total = residual.add_(product if into.bias is None else product + into.bias)
            return total, None if norm_weight is None else self._norm(total, norm_weight)
        first, small_sum = self.ranks.tensor_rank == 0, self.ranks.small_sum
        if norm_weight is not None and small_sum is not None and small_sum.takes_rows(len(x)):
            part = into(x) if first else into.without_bias(x)  # what is there once, one rank brings
            return small_sum.add_norm(part, residual, norm_weight, self.eps, turn=turn)
        if norm_weight is not None and self.ranks.tensor_size == 1:
            return residual, linear_add_norm(x, into.weight, residual, norm_weight, self.eps, into.bias, into.scale)
        part = linear_add(x, into.weight, residual, into.bias, into.scale) if first else into.without_bias(x)
        total = self.ranks.sum(part)
        return total, None if norm_weight is None else norm(total, norm_weight, self.eps)

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return (rms_norm if self.round_as_trained else norm)(x, weight, self.eps)

    def _product(self, x: Tensor, by: _Linear) -> Tensor:
        if self.round_as_trained and by.bias is not None:
            return by.without_bias(x) + by.bias
        return by(x)

    def _swiglu(self, x: Tensor, by: _Linear) -> Tensor:
        if not self.round_as_trained:
            return linear_swiglu(x, by.weight, by.bias, by.scale)
        gate, opened = self._product(x, by).chunk(2, dim=-1)
        return torch.nn.functional.silu(gate) * opened

    def _attend(self, normed: Tensor, layer: _Layer, table: Tensor, step: StepTensors, store: KVStore) -> Tensor:
        """Attention of one layer over the cache: [n, hidden] -> [n, heads * head dim]."""
        by = layer.qkv
        cached = table, *store.flat[layer.index], step.write_slots, step.write_tokens
        norms = {"query_norm": layer.query_norm, "key_norm": layer.key_norm, "eps": self.eps}
        if self.round_as_trained:
            mixed = self._product(normed, by)
            query = write_kv(mixed.view(len(mixed), self.num_groups, -1), *cached, **norms)
        else:
            query = linear_write_kv(normed, by.weight, by.bias, by.scale, *cached, **norms)
        out = step.attention(query, store.keys[layer.index], store.values[layer.index], self.softmax_scale)
        return out.flatten(1)


def _layer(state: dict[str, Tensor], index: int) -> _Layer:
    prefix = f"decoder.layers.{index}."

    def weights(name: str) -> _Linear:
        weight, bias, scale = (state.get(f"{prefix}{name}.{part}") for part in ("weight", "bias", "weight_scale"))
        assert weight is not None
        return _Linear(weight=weight, bias=bias, scale=scale)

    return _Layer(
        index=index,
        attention_norm=state[f"{prefix}input_layernorm.weight"],
        qkv=weights("self_attention.linear_qkv"),
        query_norm=state.get(f"{prefix}self_attention.q_layernorm.weight"),
        key_norm=state.get(f"{prefix}self_attention.k_layernorm.weight"),
        proj=weights("self_attention.linear_proj"),
        mlp_norm=state[f"{prefix}pre_mlp_layernorm.weight"],
        fc1=weights("mlp.linear_fc1"),
        fc2=weights("mlp.linear_fc2"),
    )
