"""Qwen2 and Qwen2.5: bias on query, key and value."""

from __future__ import annotations

from megatron_multiverse.checkpoints.names.decoder import ATTENTION, DECODER, QKV_BIAS_PARTS
from megatron_multiverse.checkpoints.names.table import Family, Row

QWEN2 = Family(
    name="qwen2",
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    add_qkv_bias=True,
    qk_layernorm=False,
    defaults=(("rms_norm_eps", 1e-6), ("max_position_embeddings", 32768), ("num_key_value_heads", 32)),
    extra=(("use_sliding_window", False),),
    rows=(*DECODER, Row(ATTENTION + "linear_qkv.bias", "qkv", QKV_BIAS_PARTS)),
)
