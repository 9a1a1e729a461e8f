"""Model FLOPs for MFU, counted on what the model really has to compute.

Matrix products count 2 FLOPs per multiply-add, the backward pass twice the forward pass. Attention counts *visible*
(query, key) pairs only, so a mask that hides half of the pairs halves the count. Embedding look-ups count nothing,
the output layer counts. Recomputation, norms and rotary embedding count nothing.
"""

from __future__ import annotations

import re

import torch

from megatron_multiverse.config import ModelConfig

PEAK_TFLOPS: dict[str, tuple[float, float]] = {
    "B200": (2250.0, 37.0),
    "GH200": (989.4, 66.9),
    "H200 NVL": (835.5, 60.0),
    "H200": (989.4, 66.9),
    "H100 NVL": (835.5, 60.0),
    "H100 PCIe": (756.0, 51.0),
    "H100": (989.4, 66.9),
    "H800": (989.4, 1.0),
    "H20": (148.0, 1.0),
    "A100": (311.9, 19.5),
    "A800": (311.9, 9.7),
    "L40S": (362.0, 1.4),
}
"""Dense tensor-core peaks by words of the device's name, those of special kinds first: bf16, and float64. Float32,
which means TF32 here, has half the peak of bf16 on all of them. From NVIDIA's data sheets, whose figures for bf16 with
sparsity are twice as large; none was measured here."""


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


def peak_tflops(device: torch.device, dtype: str, override: float | None = None, *, devices: int = 1) -> float | None:
    """Peak of so many devices together in TFLOP/s, or None if it is not known; `override` is that of one."""
    peak = override
    if peak is None and device.type == "cuda":
        peak = peak_of(torch.cuda.get_device_name(device), dtype)
    return None if peak is None else devices * peak


def peak_of(name: str, dtype: str) -> float | None:
    """Peak in TFLOP/s of the device called so, or None if it is not known."""
    found = (peaks for words, peaks in PEAK_TFLOPS.items() if re.search(rf"\b{words}\b", name))
    bf16, float64 = next(found, (None, None))
    if bf16 is None:
        return None
    return {"bf16": bf16, "float32": bf16 / 2, "float64": float64}.get(dtype)
