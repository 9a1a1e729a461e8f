"""Llama 3, 3.1, 3.2 and 3.3 (text, dense)."""

from __future__ import annotations

from megatron_multiverse.conversion.names import Family, Row

LAYER, HF = "decoder.layers.{i}.", "model.layers.{i}."

LLAMA = Family(
    name="llama",
    model_type="llama",
    architecture="LlamaForCausalLM",
    add_qkv_bias=False,
    qk_layernorm=False,
    add_bias_linear=True,
    defaults=(("rope_theta", 1e4), ("rms_norm_eps", 1e-6), ("max_position_embeddings", 2048)),
    extra=(),
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
            only="biased",
        ),
        Row(LAYER + "self_attention.linear_proj.weight", "row", ((HF + "self_attn.o_proj.weight", "hidden q"),)),
        Row(
            LAYER + "self_attention.linear_proj.bias",
            "replicated",
            ((HF + "self_attn.o_proj.bias", "hidden"),),
            only="biased",
        ),
        Row(LAYER + "pre_mlp_layernorm.weight", "replicated", ((HF + "post_attention_layernorm.weight", "hidden"),)),
        Row(
            LAYER + "mlp.linear_fc1.weight",
            "gate_up",
            ((HF + "mlp.gate_proj.weight", "ffn hidden"), (HF + "mlp.up_proj.weight", "ffn hidden")),
        ),
        Row(
            LAYER + "mlp.linear_fc1.bias",
            "gate_up",
            ((HF + "mlp.gate_proj.bias", "ffn"), (HF + "mlp.up_proj.bias", "ffn")),
            only="biased",
        ),
        Row(LAYER + "mlp.linear_fc2.weight", "row", ((HF + "mlp.down_proj.weight", "hidden ffn"),)),
        Row(LAYER + "mlp.linear_fc2.bias", "replicated", ((HF + "mlp.down_proj.bias", "hidden"),), only="biased"),
        Row("decoder.final_layernorm.weight", "replicated", (("model.norm.weight", "hidden"),)),
        Row("output_layer.weight", "vocab", (("lm_head.weight", "vocab hidden"),), only="untied"),
    ),
)
