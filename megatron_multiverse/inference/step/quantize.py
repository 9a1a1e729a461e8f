"""The products of a model's layers in FP8: half the bytes that a decode step has to read."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from megatron_multiverse.errors import ConfigError
from megatron_multiverse.inference.step.model_ranks import ModelRanks
from megatron_multiverse.kernels.fused_linear import FP8, quantize_rows


@torch.no_grad()
def quantize_products(model: nn.Module, ranks: ModelRanks) -> None:
    """Round the weights of attention and MLP to FP8 with a scale for each row, in place; see `quantize_rows`.

    Embedding, output layer, norms, biases and the cache stay as they are. The model serves decoding alone from then on.
    One that is in FP8 already is left alone.

    Raises:
        ConfigError: the model is spread over ranks, or the GPU knows no FP8.
    """
    if ranks.size > 1:
        raise ConfigError(
            f"quantization fp8 runs on one rank, the model is spread over {ranks.size}: use one, or leave it out"
        )
    for product in products_of(model):
        if product.weight.dtype == FP8:
            continue
        check_device(product.weight.device)
        weight, scale = quantize_rows(product.weight)
        product.weight = nn.Parameter(weight, requires_grad=False)
        product.register_buffer("weight_scale", scale)


def products_of(model: nn.Module) -> Iterator[Any]:
    """The linear layers whose weights are rounded: four for each decoder layer.

    Args:
        model: as `build_gpt_model` makes it, whole or the part of one rank.

    Returns:
        Layer by layer the products with `weight` of shape [out, in], in order: queries, keys and values
        [(num_attention_heads + 2 num_query_groups) kv_channels, hidden_size]; what attention gives
        [hidden_size, num_attention_heads kv_channels]; gate and up [2 ffn_hidden_size, hidden_size]; down
        [hidden_size, ffn_hidden_size]. With tensor parallelism a rank has its share of all but hidden_size.
    """
    for layer in model.decoder.layers:  # type: ignore[union-attr]
        attention, mlp = layer.self_attention, layer.mlp
        yield from (attention.linear_qkv, attention.linear_proj, mlp.linear_fc1, mlp.linear_fc2)


def check_device(device: torch.device) -> None:
    """Refuse a GPU that knows no FP8; a CPU does it slowly, for tests and trials.

    Raises:
        ConfigError: naming it.
    """
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        name = torch.cuda.get_device_name(device)
        raise ConfigError(f"quantization fp8 needs a GPU of compute capability 8.9 or higher, {name} is older")
