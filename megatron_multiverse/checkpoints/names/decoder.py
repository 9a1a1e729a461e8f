"""Rows of the name tables that the families share; each family's own file says what it has beside them."""

from __future__ import annotations

from megatron_multiverse.checkpoints.names.table import Row

LAYER, HF = "decoder.layers.{i}.", "model.layers.{i}."
ATTENTION, HF_ATTENTION = LAYER + "self_attention.", HF + "self_attn."

DECODER = (
    Row("embedding.word_embeddings.weight", "vocab", (("model.embed_tokens.weight", "vocab hidden"),)),
    Row(LAYER + "input_layernorm.weight", "replicated", ((HF + "input_layernorm.weight", "hidden"),)),
    Row(
        ATTENTION + "linear_qkv.weight",
        "qkv",
        (
            (HF_ATTENTION + "q_proj.weight", "q hidden"),
            (HF_ATTENTION + "k_proj.weight", "kv hidden"),
            (HF_ATTENTION + "v_proj.weight", "kv hidden"),
        ),
    ),
    Row(ATTENTION + "linear_proj.weight", "row", ((HF_ATTENTION + "o_proj.weight", "hidden q"),)),
    Row(LAYER + "pre_mlp_layernorm.weight", "replicated", ((HF + "post_attention_layernorm.weight", "hidden"),)),
    Row(
        LAYER + "mlp.linear_fc1.weight",
        "gate_up",
        ((HF + "mlp.gate_proj.weight", "ffn hidden"), (HF + "mlp.up_proj.weight", "ffn hidden")),
    ),
    Row(LAYER + "mlp.linear_fc2.weight", "row", ((HF + "mlp.down_proj.weight", "hidden ffn"),)),
    Row("decoder.final_layernorm.weight", "replicated", (("model.norm.weight", "hidden"),)),
    Row("output_layer.weight", "vocab", (("lm_head.weight", "vocab hidden"),), only="untied"),
)
"""Weights of a pre-norm decoder with grouped attention and a gated MLP."""

QKV_BIAS_PARTS = tuple((f"{HF_ATTENTION}{name}_proj.bias", "q" if name == "q" else "kv") for name in "qkv")
"""Query, key and value biases, for a row with the rule `qkv`."""
