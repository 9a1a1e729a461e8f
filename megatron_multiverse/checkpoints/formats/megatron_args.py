"""Megatron-LM's `args`, which its checkpoints carry, from a ModelConfig and back."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from megatron_multiverse.config import ModelConfig, RopeScaling
from megatron_multiverse.errors import ConfigError


def args_from_config(config: ModelConfig, *, padded_vocab_size: int, tp: int, pp: int, dtype: Any) -> Namespace:
    """What Megatron-LM compares with its own flags, or takes over with --use-checkpoint-args."""
    scaling = config.rope_scaling
    return Namespace(
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        ffn_hidden_size=config.ffn_hidden_size,
        num_attention_heads=config.num_attention_heads,
        group_query_attention=config.num_query_groups != config.num_attention_heads,
        num_query_groups=config.num_query_groups,
        kv_channels=config.kv_channels,
        padded_vocab_size=padded_vocab_size,
        vocab_size=config.vocab_size,
        max_position_embeddings=config.max_sequence_length,
        seq_length=config.max_sequence_length,
        position_embedding_type="rope",
        rotary_base=config.rotary_base,
        rotary_percent=1.0,
        use_rotary_position_embeddings=True,
        use_rope_scaling=scaling is not None,
        rope_scaling_factor=scaling.factor if scaling else 8.0,
        add_position_embedding=False,
        normalization="RMSNorm",
        norm_epsilon=config.layernorm_epsilon,
        swiglu=True,
        add_bias_linear=config.add_bias_linear,
        add_qkv_bias=config.add_qkv_bias,
        qk_layernorm=config.qk_layernorm,
        untie_embeddings_and_output_weights=not config.share_embeddings_and_output_weights,
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        virtual_pipeline_model_parallel_size=None,
        params_dtype=dtype,
        num_experts=None,
        use_mcore_models=True,
        tokenizer_type="HuggingFaceTokenizer",
        no_save_optim=True,
        no_save_rng=True,
        iteration=0,
        consumed_train_samples=0,
        consumed_valid_samples=0,
    )


def config_from_args(args: Any, *, where: str) -> ModelConfig:
    """The shape that Megatron-LM's args describe; vocab_size is the padded one.

    Raises:
        ConfigError: an argument is missing or asks for something the dense model here does not do.
    """
    values = vars(args) if not isinstance(args, dict) else args
    wanted = {
        "num_experts": (None, 0),
        "normalization": ("RMSNorm",),
        "swiglu": (True,),
        "position_embedding_type": ("rope",),
        "rotary_percent": (1.0,),
    }
    for key, allowed in wanted.items():
        if values.get(key, allowed[0]) not in allowed:
            raise ConfigError(f"{where}: args.{key} is {values[key]!r}, supported: {allowed[0]!r}")
    try:
        heads = values["num_attention_heads"]
        grouped = values.get("group_query_attention", values.get("num_query_groups") is not None)
        scaled = values.get("use_rope_scaling", False)
        return ModelConfig(
            num_layers=values["num_layers"],
            hidden_size=values["hidden_size"],
            ffn_hidden_size=values["ffn_hidden_size"],
            num_attention_heads=heads,
            num_query_groups=values["num_query_groups"] if grouped else heads,
            kv_channels=values["kv_channels"],
            vocab_size=values["padded_vocab_size"],
            max_sequence_length=values["max_position_embeddings"],
            rotary_base=float(values["rotary_base"]),
            rope_scaling=RopeScaling(rope_type="llama3", factor=values["rope_scaling_factor"]) if scaled else None,
            layernorm_epsilon=values["norm_epsilon"],
            add_qkv_bias=values.get("add_qkv_bias", False),
            add_bias_linear=values.get("add_bias_linear", True),
            qk_layernorm=values.get("qk_layernorm", False),
            share_embeddings_and_output_weights=not values["untie_embeddings_and_output_weights"],
        )
    except KeyError as error:
        raise ConfigError(
            f"{where}: args has no {error.args[0]}; give --model-config with a model_config.json or config.json"
        ) from error
