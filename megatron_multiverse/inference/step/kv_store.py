"""Cached keys and values of this rank's layers and heads, and attention over them.

All tokens of a step lie in one sequence [1, n], so megatron-core's layers run unchanged; only their core attention asks
`PagedParams`, which writes the new keys and values into their slots and then lets every row attend over its pages.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from megatron_multiverse.inference.step.plan import Ints, StepPlan
from megatron_multiverse.kernels.kv_copy import copy_slots
from megatron_multiverse.kernels.tree_decode import RowGroup, group_rows, tree_decode
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


@dataclass
class PagedParams(AttentionParams):
    """Attention over the store for one step."""

    store: KVStore = field(kw_only=True, repr=False)
    plan: StepPlan = field(kw_only=True, repr=False)
    pages: Tensor = field(kw_only=True, repr=False)
    """int32 [rows, p], `plan.pages` on the device; so are the next four."""
    lengths: Tensor = field(kw_only=True, repr=False)
    borders: Tensor = field(kw_only=True, repr=False)
    write_slots: Tensor = field(kw_only=True, repr=False)
    write_tokens: Tensor | None = field(kw_only=True, repr=False)
    """None where slot i receives token i."""
    groups: list[RowGroup] | None = field(default=None, repr=False)
    """How the reference of tree_decode pads the rows: the same for all layers, so made at the first."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, *, layer_number: int, softmax_scale: float) -> Tensor:
        """See AttentionParams.attend; s is the number of tokens of the step, b is 1."""
        layer = layer_number - self.store.first_layer
        keys, values = self.store.keys[layer], self.store.values[layer]
        flat_keys, flat_values = self.store.flat[layer]
        key, value = key[:, 0], value[:, 0]
        if self.write_tokens is not None:
            key, value = key.index_select(0, self.write_tokens), value.index_select(0, self.write_tokens)
        flat_keys.index_copy_(0, self.write_slots, key)
        flat_values.index_copy_(0, self.write_slots, value)
        if self.groups is None:
            plan = self.plan
            self.groups = group_rows(plan.pages, plan.lengths, plan.borders, keys.shape[1], keys.device)
        out: Tensor = tree_decode(
            query[:, 0], keys, values, self.pages, self.lengths, self.borders, softmax_scale, groups=self.groups
        )
        return out.flatten(1)[:, None]
