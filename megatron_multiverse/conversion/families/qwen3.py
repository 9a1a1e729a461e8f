"""Qwen3 (dense)."""

from __future__ import annotations

from megatron_multiverse.conversion.names import Family, Row

LAYER, HF = "decoder.layers.{i}.", "model.layers.{i}."

QWEN3 = Family(
    name="qwen3",
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    add_qkv_bias=False,
    qk_layernorm=True,
    defaults=(("rope_theta", 1e4), ("rms_norm_eps", 1e-6), ("max_position_embeddings", 32768), ("head_dim", 128)),
    extra=(("attention_bias", False), ("use_sliding_window", False)),
    rows=(
        Row("embedding.word_embeddings.weight", "vocab", (("model.embed_tokens.weight", "vocab hidden"),)),
        Row(LAYER + "input_layernorm.weight", "replicated", ((HF + "input_layernorm.weight", "hidden"),)),
        Row(
            LAYER + "self_attention.linear_qkv.weight",
            "qkv",
            (
                (HF + "self_attn.q_proj.weight", "q hidden"),
                (HF + "self_attn.k_proj.weight", "kv hidden"),
                (HF + "self_attn.v_proj.weight", "kv hidden"),
            ),
        ),
        Row(LAYER + "self_attention.q_layernorm.weight", "replicated", ((HF + "self_attn.q_norm.weight", "head"),)),
        Row(LAYER + "self_attention.k_layernorm.weight", "replicated", ((HF + "self_attn.k_norm.weight", "head"),)),
        Row(LAYER + "self_attention.linear_proj.weight", "row", ((HF + "self_attn.o_proj.weight", "hidden q"),)),
        Row(LAYER + "pre_mlp_layernorm.weight", "replicated", ((HF + "post_attention_layernorm.weight", "hidden"),)),
        Row(
            LAYER + "mlp.linear_fc1.weight",
            "gate_up",
            ((HF + "mlp.gate_proj.weight", "ffn hidden"), (HF + "mlp.up_proj.weight", "ffn hidden")),
        ),
        Row(LAYER + "mlp.linear_fc2.weight", "row", ((HF + "mlp.down_proj.weight", "hidden ffn"),)),
        Row("decoder.final_layernorm.weight", "replicated", (("model.norm.weight", "hidden"),)),
        Row("output_layer.weight", "vocab", (("lm_head.weight", "vocab hidden"),), only="untied"),
    ),
)
