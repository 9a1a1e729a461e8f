"""The shape of a model, in megatron-core's names. Imports no torch."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_multiverse.config.strict import check, check_choices, check_finite, dataclass_from_mapping


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Stretches the rotary frequencies to a longer context."""

    rope_type: Literal["linear", "llama3"]
    """linear divides all frequencies by factor; llama3 (Llama 3.1 and later) only the slow ones."""
    factor: float
    """How many times longer the context is."""
    low_freq_factor: float = 1.0
    """llama3: waves longer than original context / this are divided by factor."""
    high_freq_factor: float = 4.0
    """llama3: waves shorter than original context / this stay; between the two it interpolates."""
    original_max_position_embeddings: int = 8192
    """llama3: context length before stretching."""

    def __post_init__(self) -> None:
        check_choices(self, "rope_scaling.")
        check_finite(self, "rope_scaling.")
        check(self.factor >= 1, f"rope_scaling.factor must be at least 1, got {self.factor}")
        low, high = self.low_freq_factor, self.high_freq_factor
        check(0 < low < high, f"rope_scaling: 0 < low_freq_factor ({low}) < high_freq_factor ({high}) must hold")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Shape of a decoder-only transformer, in megatron-core's names. Presets: `model/families.py`."""

    num_layers: int
    """Number of transformer layers."""
    hidden_size: int
    """Width of the residual stream."""
    ffn_hidden_size: int
    """Width of the gated MLP (SwiGLU)."""
    num_attention_heads: int
    """Number of query heads."""
    num_query_groups: int
    """Number of key/value heads; must divide num_attention_heads."""
    kv_channels: int
    """Width of one head; must be even (rotary embedding turns pairs)."""
    vocab_size: int
    """Rows of the embedding, tags and padding included."""
    max_sequence_length: int
    """Longest sequence in tokens; seq_length must not exceed it."""
    rotary_base: float = 1e6
    """Base of the rotary frequencies (rope_theta)."""
    rope_scaling: RopeScaling | None = None
    """Stretching of the rotary frequencies (Llama 3.1 and later); unset for none."""
    layernorm_epsilon: float = 1e-6
    """Epsilon of every RMSNorm."""
    add_qkv_bias: bool = False
    """Bias on the query, key and value projections (Qwen2)."""
    add_bias_linear: bool = False
    """Bias on every linear layer of attention and MLP (Llama with attention_bias and mlp_bias)."""
    qk_layernorm: bool = False
    """RMSNorm on each query and key head (Qwen3)."""
    share_embeddings_and_output_weights: bool = True
    """Tied input and output embeddings."""

    def __post_init__(self) -> None:
        check_finite(self, "model.")
        for field_ in dataclasses.fields(self):
            value = getattr(self, field_.name)
            if type(value) is int:
                check(value >= 1, f"model.{field_.name} must be at least 1, got {value}")
        check(
            self.num_attention_heads % self.num_query_groups == 0,
            f"model.num_attention_heads ({self.num_attention_heads}) must be divisible by "
            f"model.num_query_groups ({self.num_query_groups})",
        )
        check(self.kv_channels % 2 == 0, f"model.kv_channels must be even for rotary, got {self.kv_channels}")
        check(self.rotary_base > 0, f"model.rotary_base must be positive, got {self.rotary_base}")
        check(self.layernorm_epsilon > 0, f"model.layernorm_epsilon must be > 0, got {self.layernorm_epsilon}")

    @property
    def num_parameters(self) -> int:
        """Number of trainable parameters of the model this config describes."""
        qkv = (self.num_attention_heads + 2 * self.num_query_groups) * self.kv_channels
        attention = self.hidden_size * qkv + self.num_attention_heads * self.kv_channels * self.hidden_size
        attention += qkv * (self.add_qkv_bias or self.add_bias_linear) + 2 * self.kv_channels * self.qk_layernorm
        other_biases = 2 * (self.hidden_size + self.ffn_hidden_size) * self.add_bias_linear
        layer = attention + 3 * self.hidden_size * self.ffn_hidden_size + 2 * self.hidden_size + other_biases
        embeddings = self.vocab_size * self.hidden_size * (1 if self.share_embeddings_and_output_weights else 2)
        return self.num_layers * layer + embeddings + self.hidden_size

    def to_json(self, path: str | Path) -> None:
        """Write the config as a JSON object."""
        Path(path).write_text(json.dumps(dataclasses.asdict(self), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def from_json(cls, path: str | Path) -> ModelConfig:
        """Read what `to_json` wrote; unknown or missing keys raise ConfigError."""
        return dataclass_from_mapping(cls, json.loads(Path(path).read_text(encoding="utf-8")), where=str(path))


def pad_vocab_size(size: int, multiple: int) -> int:
    """Smallest multiple of `multiple` that holds `size` rows: the one rule by which vocabularies are padded.

    Megatron's multiple is make_vocab_size_divisible_by x the tensor parallel size.
    """
    return -(-size // multiple) * multiple
