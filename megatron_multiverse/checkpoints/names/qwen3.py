"""Qwen3 (dense): RMSNorm on query and key heads."""

from __future__ import annotations

from megatron_multiverse.checkpoints.names.decoder import ATTENTION, DECODER, HF_ATTENTION
from megatron_multiverse.checkpoints.names.table import Family, Row

QWEN3 = Family(
    name="qwen3",
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    add_qkv_bias=False,
    qk_layernorm=True,
    defaults=(
        ("rms_norm_eps", 1e-6),
        ("max_position_embeddings", 32768),
        ("num_key_value_heads", 32),
        ("head_dim", 128),
    ),
    extra=(("attention_bias", False), ("use_sliding_window", False)),
    rows=(
        *DECODER,
        Row(ATTENTION + "q_layernorm.weight", "replicated", ((HF_ATTENTION + "q_norm.weight", "head"),)),
        Row(ATTENTION + "k_layernorm.weight", "replicated", ((HF_ATTENTION + "k_norm.weight", "head"),)),
    ),
)
