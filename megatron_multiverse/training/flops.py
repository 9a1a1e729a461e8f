"""Model FLOPs for MFU, counted on what the model really has to compute.

Matrix products count 2 FLOPs per multiply-add, the backward pass twice the forward pass. Attention counts *visible*
(query, key) pairs only, so a mask that hides half of the pairs halves the count. Embedding look-ups count nothing,
the output layer counts. Recomputation, norms and rotary embedding count nothing.
"""

from __future__ import annotations

import torch

from megatron_multiverse.config import ModelConfig

PEAK_TFLOPS: dict[str, dict[str, float]] = {
    "H200": {"bf16": 989.4, "float32": 494.7, "float64": 66.9},
    "H100": {"bf16": 989.4, "float32": 494.7, "float64": 66.9},
    "A100": {"bf16": 311.9, "float32": 155.9, "float64": 19.5},
}
"""Dense tensor-core peaks of the SXM parts by name and training dtype; float32 means TF32 here."""


def matmul_parameters(config: ModelConfig) -> int:
    """Parameters that take part in matrix products: all but norms, biases and the input embedding."""
    heads, groups, width = config.num_attention_heads, config.num_query_groups, config.kv_channels
    attention = config.hidden_size * width * (2 * heads + 2 * groups)
    layer = attention + 3 * config.hidden_size * config.ffn_hidden_size
    return config.num_layers * layer + config.vocab_size * config.hidden_size


def training_flops(config: ModelConfig, num_tokens: int, num_visible_pairs: int) -> float:
    """FLOPs of forward and backward over `num_tokens` tokens with `num_visible_pairs` pairs per layer and head."""
    linear = 6 * matmul_parameters(config) * num_tokens
    attention = 12 * config.num_layers * config.num_attention_heads * config.kv_channels * num_visible_pairs
    return float(linear + attention)


def peak_tflops(device: torch.device, dtype: str, override: float | None = None) -> float | None:
    """Peak of one device in TFLOP/s, or None if it is not known."""
    if override is not None:
        return override
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    found = [peaks for part, peaks in PEAK_TFLOPS.items() if part in name and "PCIe" not in name]
    return found[0].get(dtype) if found else None
