"""Llama 3, 3.1, 3.2 and 3.3 (text, dense); its configs may ask for a bias on every linear layer."""

from __future__ import annotations

from megatron_multiverse.checkpoints.names.decoder import (
    ATTENTION,
    DECODER,
    HF,
    HF_ATTENTION,
    LAYER,
    QKV_BIAS_PARTS,
)
from megatron_multiverse.checkpoints.names.table import Family, Row

GATE_UP_BIAS_PARTS = ((HF + "mlp.gate_proj.bias", "ffn"), (HF + "mlp.up_proj.bias", "ffn"))

LLAMA = Family(
    name="llama",
    model_type="llama",
    architecture="LlamaForCausalLM",
    add_qkv_bias=False,
    qk_layernorm=False,
    add_bias_linear=True,
    defaults=(("rms_norm_eps", 1e-6), ("max_position_embeddings", 2048)),
    extra=(),
    rows=(
        *DECODER,
        Row(ATTENTION + "linear_qkv.bias", "qkv", QKV_BIAS_PARTS, only="biased"),
        Row(ATTENTION + "linear_proj.bias", "replicated", ((HF_ATTENTION + "o_proj.bias", "hidden"),), only="biased"),
        Row(LAYER + "mlp.linear_fc1.bias", "gate_up", GATE_UP_BIAS_PARTS, only="biased"),
        Row(LAYER + "mlp.linear_fc2.bias", "replicated", ((HF + "mlp.down_proj.bias", "hidden"),), only="biased"),
    ),
)
