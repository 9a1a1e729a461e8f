"""transformers models as the reference, and their weights under megatron-core's names."""

from __future__ import annotations

import torch

from megatron_multiverse.config import ModelConfig


def hf_model(family: str, config: ModelConfig, **changes: object) -> torch.nn.Module:
    """A random transformers model of the given shape (norm weights and biases random too)."""
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.ffn_hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_query_groups,
        "head_dim": config.kv_channels,
        "max_position_embeddings": config.max_sequence_length,
        "rms_norm_eps": config.layernorm_epsilon,
        "tie_word_embeddings": config.share_embeddings_and_output_weights,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rotary_base},
        "attn_implementation": "sdpa",
        "use_cache": False,
    }
    hf_config = AutoConfig.for_model(family, **{**shape, **changes})
    model = AutoModelForCausalLM.from_config(hf_config).eval()
    for parameter in model.parameters():
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, 0.5, 0.3)
    return model


def mcore_weights(hf: torch.nn.Module, config: ModelConfig) -> dict[str, torch.Tensor]:
    """Names and layouts of megatron-core for the weights of a Qwen2, Qwen3 or Llama model."""
    source = hf.state_dict()
    groups, heads, width = config.num_query_groups, config.num_attention_heads, config.kv_channels

    def interleave(parts: list[torch.Tensor]) -> torch.Tensor:
        sizes = (heads // groups * width, width, width)
        rows = [p.reshape(groups, n, *p.shape[1:]) for p, n in zip(parts, sizes, strict=True)]
        return torch.cat(rows, 1).flatten(0, 1)

    out = {
        "embedding.word_embeddings.weight": source["model.embed_tokens.weight"],
        "decoder.final_layernorm.weight": source["model.norm.weight"],
    }
    if not config.share_embeddings_and_output_weights:
        out["output_layer.weight"] = source["lm_head.weight"]
    for i in range(config.num_layers):
        a, b = f"model.layers.{i}.", f"decoder.layers.{i}."
        attention = b + "self_attention."
        out[b + "input_layernorm.weight"] = source[a + "input_layernorm.weight"]
        out[b + "pre_mlp_layernorm.weight"] = source[a + "post_attention_layernorm.weight"]
        for kind in ["weight", "bias"] if config.add_qkv_bias or config.add_bias_linear else ["weight"]:
            out[attention + f"linear_qkv.{kind}"] = interleave(
                [source[a + f"self_attn.{x}_proj.{kind}"] for x in "qkv"]
            )
        if config.qk_layernorm:
            for x in "qk":
                out[attention + f"{x}_layernorm.weight"] = source[a + f"self_attn.{x}_norm.weight"]
        for kind in ["weight", "bias"] if config.add_bias_linear else ["weight"]:
            out[attention + f"linear_proj.{kind}"] = source[a + f"self_attn.o_proj.{kind}"]
            out[b + f"mlp.linear_fc1.{kind}"] = torch.cat([source[a + f"mlp.{x}_proj.{kind}"] for x in ("gate", "up")])
            out[b + f"mlp.linear_fc2.{kind}"] = source[a + f"mlp.down_proj.{kind}"]
    return out
