"""The tensor rules: Hugging Face tensors <-> one megatron-core tensor <-> its slices for tensor parallelism.

All functions only move rows, so every round trip is bit-equal.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_multiverse.checkpoints.names.table import Entry, Rule
from megatron_multiverse.checkpoints.recycled import contiguous, empty
from megatron_multiverse.config import ModelConfig
from megatron_multiverse.errors import ConfigError


def merge(entry: Entry, parts: Sequence[Tensor], config: ModelConfig) -> Tensor:
    """The megatron-core tensor of `entry` from its Hugging Face tensors (shapes as in `entry.hf`)."""
    if entry.rule == "qkv":
        groups = config.num_query_groups
        grouped = [p.reshape(groups, -1, *p.shape[1:]) for p in parts]
        shape = (groups, sum(p.shape[1] for p in grouped), *grouped[0].shape[2:])
        whole = empty(shape, parts[0].dtype, parts[0].device)
        return torch.cat(grouped, dim=1, out=whole).flatten(0, 1)
    if entry.rule == "gate_up":
        return torch.cat(list(parts))
    return parts[0]


def split(entry: Entry, tensor: Tensor, config: ModelConfig) -> list[Tensor]:
    """The Hugging Face tensors of `entry`, in the order of `entry.hf`, from the megatron-core one."""
    if entry.rule == "qkv":
        groups, width = config.num_query_groups, config.kv_channels
        sizes = (config.num_attention_heads // groups * width, width, width)
        grouped = tensor.reshape(groups, sum(sizes), *tensor.shape[1:])
        return [contiguous(part).flatten(0, 1) for part in torch.split(grouped, list(sizes), dim=1)]
    if entry.rule == "gate_up":
        return list(tensor.chunk(2))
    return [tensor]


def check_divisible(config: ModelConfig, tp: int, pp: int) -> None:
    """Raise ConfigError if the model cannot be cut into `tp` x `pp` parts.

    More tensor-parallel ranks than key/value heads are allowed, as in megatron-core: the rows of the qkv projection
    are cut evenly all the same, and the ranks that share a key/value head gather its rows.
    """
    heads, groups = config.num_attention_heads, config.num_query_groups
    for name in ("num_attention_heads", "ffn_hidden_size", "vocab_size"):
        size = getattr(config, name)
        if tp < 1 or size % tp:
            raise ConfigError(f"{name} ({size}) is not divisible by --tensor-model-parallel-size ({tp})")
    if groups % tp and tp % groups:
        raise ConfigError(
            f"num_query_groups ({groups}) is neither a multiple nor a divisor of --tensor-model-parallel-size ({tp})"
        )
    if (rows := (heads + 2 * groups) * config.kv_channels) % tp:
        raise ConfigError(
            f"the {rows} rows of the qkv projection are not divisible by --tensor-model-parallel-size ({tp})"
        )
    if pp < 1 or config.num_layers % pp:
        raise ConfigError(f"num_layers ({config.num_layers}) is not divisible by --pipeline-model-parallel-size ({pp})")


def slices(rule: Rule, tensor: Tensor, tp: int) -> list[Tensor]:
    """What each tensor-parallel rank holds: views of `tensor` where possible."""
    if tp == 1 or rule == "replicated":
        return [tensor] * tp
    if rule == "row":
        return list(tensor.chunk(tp, dim=1))
    if rule == "gate_up":
        gate, up = tensor.chunk(2)
        return [torch.cat(pair) for pair in zip(gate.chunk(tp), up.chunk(tp), strict=True)]
    return list(tensor.chunk(tp))


def join(rule: Rule, parts: Sequence[Tensor]) -> Tensor:
    """The whole tensor from what each tensor-parallel rank holds; the inverse of `slices`."""
    if len(parts) == 1 or rule == "replicated":
        return parts[0]
    if rule == "row":
        return torch.cat(list(parts), dim=1)
    if rule == "gate_up":
        halves = [part.chunk(2) for part in parts]
        return torch.cat([gate for gate, _ in halves] + [up for _, up in halves])
    return torch.cat(list(parts))
