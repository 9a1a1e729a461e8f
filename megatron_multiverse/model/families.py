"""Model families as presets of ModelConfig.

A new family is a new function here, and its weight names in `checkpoints/names/`.

What distinguishes the families, as far as megatron-core is concerned:

| family    | qkv bias | q/k norm | embeddings                  | rotary base |
|-----------|----------|----------|-----------------------------|-------------|
| Qwen2/2.5 | yes      | no       | tied up to 3B, untied above | 1e6         |
| Qwen3     | no       | yes      | tied up to 4B, untied above | 1e6         |
| Llama 3   | no       | no       | tied for 1B/3B, untied above| 5e5         |

Each function gives the family's switches; the shape is the caller's. `PRESETS` holds shapes by name, which is what
`model_preset` in a training configuration takes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megatron_multiverse.config import ModelConfig
from megatron_multiverse.errors import ConfigError


def _family(shape: dict[str, Any], **switches: Any) -> ModelConfig:
    shape.setdefault("num_query_groups", shape["num_attention_heads"])
    shape.setdefault("kv_channels", shape["hidden_size"] // shape["num_attention_heads"])
    return ModelConfig(**{**switches, **shape})


def qwen2(**shape: Any) -> ModelConfig:
    """Qwen2 and Qwen2.5: bias on query, key and value."""
    return _family(shape, add_qkv_bias=True, qk_layernorm=False, rotary_base=1e6, layernorm_epsilon=1e-6)


def qwen3(**shape: Any) -> ModelConfig:
    """Qwen3: RMSNorm on query and key heads, no bias."""
    return _family(shape, add_qkv_bias=False, qk_layernorm=True, rotary_base=1e6, layernorm_epsilon=1e-6)


def llama3(**shape: Any) -> ModelConfig:
    """Llama 3; for 3.1 and later add `rope_scaling=RopeScaling(rope_type="llama3", factor=8.0)` (3.2: 32.0)."""
    return _family(shape, add_qkv_bias=False, qk_layernorm=False, rotary_base=5e5, layernorm_epsilon=1e-5)


# Shapes of published checkpoints, and one for tests. A tokenizer's tags must fit into vocab_size.
PRESETS: dict[str, Callable[[], ModelConfig]] = {
    "qwen2.5-0.5b": lambda: qwen2(
        num_layers=24, hidden_size=896, ffn_hidden_size=4864, num_attention_heads=14, num_query_groups=2,
        vocab_size=151936, max_sequence_length=32768,
    ),
    "qwen2.5-1.5b": lambda: qwen2(
        num_layers=28, hidden_size=1536, ffn_hidden_size=8960, num_attention_heads=12, num_query_groups=2,
        vocab_size=151936, max_sequence_length=32768,
    ),
    "qwen2.5-7b": lambda: qwen2(
        num_layers=28, hidden_size=3584, ffn_hidden_size=18944, num_attention_heads=28, num_query_groups=4,
        vocab_size=152064, max_sequence_length=32768, share_embeddings_and_output_weights=False,
    ),
    "qwen2.5-32b": lambda: qwen2(
        num_layers=64, hidden_size=5120, ffn_hidden_size=27648, num_attention_heads=40, num_query_groups=8,
        vocab_size=152064, max_sequence_length=32768, share_embeddings_and_output_weights=False,
    ),
    "qwen3-0.6b": lambda: qwen3(
        num_layers=28, hidden_size=1024, ffn_hidden_size=3072, num_attention_heads=16, num_query_groups=8,
        kv_channels=128, vocab_size=151936, max_sequence_length=40960,
    ),
    "tiny": lambda: qwen3(
        num_layers=2, hidden_size=64, ffn_hidden_size=128, num_attention_heads=4, num_query_groups=2,
        kv_channels=16, vocab_size=512, max_sequence_length=1024,
    ),
}  # fmt: skip


def preset(name: str) -> ModelConfig:
    """Config of a named model. Raises ConfigError for an unknown name."""
    if name not in PRESETS:
        raise ConfigError(f"unknown model preset {name!r}, allowed: {', '.join(sorted(PRESETS))}")
    return PRESETS[name]()
