"""Qwen2 and Qwen2.5."""

from __future__ import annotations

from megatron_multiverse.conversion.names import Family, Row

LAYER, HF = "decoder.layers.{i}.", "model.layers.{i}."

QWEN2 = Family(
    name="qwen2",
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    add_qkv_bias=True,
    qk_layernorm=False,
    defaults=(("rope_theta", 1e4), ("rms_norm_eps", 1e-6), ("max_position_embeddings", 32768)),
    extra=(("use_sliding_window", False),),
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
        Row(
            LAYER + "self_attention.linear_qkv.bias",
            "qkv",
            (
                (HF + "self_attn.q_proj.bias", "q"),
                (HF + "self_attn.k_proj.bias", "kv"),
                (HF + "self_attn.v_proj.bias", "kv"),
            ),
        ),
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
