"""Cached keys and values of this rank's layers and heads, and attention over them.

All tokens of a step lie in one sequence [1, n], so megatron-core's layers run unchanged; only their core attention asks
`PagedParams`, which writes the new keys and values into their slots and then lets every row attend over its pages.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from megatron_multiverse.inference.step.plan import Ints
from megatron_multiverse.inference.step.tensors import StepTensors
from megatron_multiverse.kernels.kv_copy import copy_slots
from megatron_multiverse.model.attention import AttentionParams


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
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
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
        config: Any = model.config
        first_layer, num_layers, kv_heads = 1, config.num_layers, config.num_query_groups
        if layers := getattr(getattr(model, "decoder", None), "layers", None):
            first_layer, num_layers = layers[0].layer_number, len(layers)
            kv_heads = layers[0].self_attention.num_query_groups_per_partition
        weight = next(model.parameters())
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

    def copy(self, copies: Ints) -> None:
        """Copy slots [c, 2] (from, to) in all layers; all are read before any is written."""
        source, target = torch.from_numpy(copies.T.copy()).to(self.keys.device)
        copy_slots(self.keys.flatten(1, 2), self.values.flatten(1, 2), source, target)

    def poison(self, pages: Ints) -> None:
        """Fill pages with NaN, so that a read of a freed page shows in the logits."""
        index = torch.from_numpy(pages).to(self.keys.device)
        for cached in (self.keys, self.values):
            cached.index_fill_(1, index, float("nan"))

    def write(self, layer: int, key: Tensor, value: Tensor, slots: Tensor, tokens: Tensor | None) -> None:
        """Write keys and values [n, kv heads, head dim] of one layer into their slots, see `StepTensors`."""
        keys, values = self.flat[layer]
        if tokens is not None:
            key, value = key.index_select(0, tokens), value.index_select(0, tokens)
        keys.index_copy_(0, slots, key)
        values.index_copy_(0, slots, value)


@dataclass
class PagedParams(AttentionParams):
    """Attention over the store for one step."""

    store: KVStore = field(kw_only=True, repr=False)
    tensors: StepTensors = field(kw_only=True, repr=False)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, *, layer_number: int, softmax_scale: float) -> Tensor:
        """See AttentionParams.attend; s is the number of tokens of the step, b is 1."""
        store, step = self.store, self.tensors
        layer = layer_number - store.first_layer
        store.write(layer, key[:, 0], value[:, 0], step.write_slots, step.write_tokens)
        out = step.attention(query[:, 0], store.keys[layer], store.values[layer], softmax_scale)
        return out.flatten(1)[:, None]
