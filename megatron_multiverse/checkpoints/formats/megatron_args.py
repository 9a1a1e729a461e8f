"""Megatron-LM's `args`, which its checkpoints carry, from a ModelConfig and back."""

from __future__ import annotations

import dataclasses
import logging
from argparse import Namespace
from collections.abc import Mapping
from typing import Any

from megatron_multiverse.checkpoints.formats.megatron_args_names import has_no_effect
from megatron_multiverse.config import ModelConfig, RopeScaling
from megatron_multiverse.config.strict import dataclass_from_mapping
from megatron_multiverse.errors import ConfigError

logger = logging.getLogger(__name__)

WAY_OUT = "give --model-config with a model_config.json or config.json, which is taken instead of args"
MEGATRON_SCALING = RopeScaling(
    rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192
)
"""The one scaling of Llama 3 that Megatron-LM's GPT script builds; megatron-core could take another factor."""


def args_from_config(config: ModelConfig, *, padded_vocab_size: int, tp: int, pp: int, dtype: Any) -> Namespace:
    """What Megatron-LM compares with its own flags, or takes over with --use-checkpoint-args.

    Raises:
        ConfigError: no argument of Megatron-LM describes the model's rotary scaling.
    """
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
        **_scaling_args(config.rope_scaling),
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


def _scaling_args(scaling: RopeScaling | None) -> dict[str, Any]:
    llama3 = scaling is not None and scaling.rope_type == "llama3"
    linear = scaling.factor if scaling is not None and not llama3 else None
    if scaling is not None and llama3:
        if dataclasses.replace(scaling, factor=MEGATRON_SCALING.factor) != MEGATRON_SCALING:
            raise ConfigError(
                f"the model's rotary scaling is {scaling}, but Megatron knows only {MEGATRON_SCALING} with another "
                "factor, so no megatron-core checkpoint can say it: load the Hugging Face folder directly (init_from)"
            )
        if scaling.factor != MEGATRON_SCALING.factor:
            logger.warning(
                "Megatron-LM's GPT script ignores --rope-scaling-factor: it would build this model with %g, not %g",
                MEGATRON_SCALING.factor, scaling.factor,
            )  # fmt: skip
    return {
        "use_rope_scaling": llama3,
        "rope_scaling_factor": scaling.factor if scaling is not None and llama3 else MEGATRON_SCALING.factor,
        "rotary_seq_len_interpolation_factor": int(linear) if linear is not None and linear % 1 == 0 else linear,
    }


_UNDERSTOOD = """
    add_bias_linear add_qkv_bias ffn_hidden_size group_query_attention hidden_size kv_channels max_position_embeddings
    norm_epsilon num_attention_heads num_layers num_query_groups padded_vocab_size qk_layernorm rope_scaling_factor
    rotary_base untie_embeddings_and_output_weights use_rope_scaling
"""
UNDERSTOOD = frozenset(_UNDERSTOOD.split())
"""Arguments that become part of the shape."""
FIXED = {
    "num_experts": (None, 0),
    "normalization": ("RMSNorm",),
    "swiglu": (True,),
    "position_embedding_type": ("rope",),
    "rotary_percent": (1.0,),
    "softmax_type": ("vanilla",),
}
"""Arguments that switch something on by their default or value, and the values that our model computes."""


def config_from_args(args: Any, *, where: str) -> ModelConfig:
    """The shape that Megatron-LM's args describe; vocab_size is the padded one.

    Raises:
        ConfigError: an argument is missing or mistyped, or is set and neither understood nor known to have no effect.
    """
    values = vars(args) if not isinstance(args, dict) else args
    _refuse_unsupported(values, where)
    try:
        heads = values["num_attention_heads"]
        grouped = values.get("group_query_attention", values.get("num_query_groups") is not None)
        shape = {
            "num_layers": values["num_layers"],
            "hidden_size": values["hidden_size"],
            "ffn_hidden_size": values["ffn_hidden_size"],
            "num_attention_heads": heads,
            "num_query_groups": values["num_query_groups"] if grouped else heads,
            "kv_channels": values["kv_channels"],
            "vocab_size": values["padded_vocab_size"],
            "max_sequence_length": values["max_position_embeddings"],
            "rotary_base": values["rotary_base"],
            "rope_scaling": _scaling(values, where),
            "layernorm_epsilon": values["norm_epsilon"],
            "add_qkv_bias": values.get("add_qkv_bias", False),
            "add_bias_linear": values.get("add_bias_linear", True),
            "qk_layernorm": values.get("qk_layernorm", False),
            "share_embeddings_and_output_weights": not values["untie_embeddings_and_output_weights"],
        }
    except KeyError as error:
        raise ConfigError(f"{where}: args has no {error.args[0]}; {WAY_OUT}") from error
    return dataclass_from_mapping(ModelConfig, shape, where=f"{where}: args")


def _refuse_unsupported(values: Mapping[str, Any], where: str) -> None:
    for key, allowed in FIXED.items():
        if values.get(key, allowed[0]) not in allowed:
            raise ConfigError(f"{where}: args.{key} is {values[key]!r}, supported: {allowed[0]!r}")
    if factor := values.get("rotary_seq_len_interpolation_factor"):
        raise ConfigError(
            f"{where}: args.rotary_seq_len_interpolation_factor is {factor!r}; some versions of Megatron-LM's GPT "
            f"script divide positions by it and others ignore it: to say which, {WAY_OUT}"
        )
    for key, value in values.items():
        unset = value is None or value is False or value in (0, "", [], ())
        if not (unset or key in UNDERSTOOD or key in FIXED or has_no_effect(key)):
            raise ConfigError(
                f"{where}: args.{key} is {value!r}, which may change what the model computes and is not supported. If "
                f"it changes nothing, {WAY_OUT}"
            )


def _scaling(values: Mapping[str, Any], where: str) -> RopeScaling | None:
    """Llama 3's scaling as Megatron-LM computes it, which never hands rope_scaling_factor to the model."""
    if not values.get("use_rope_scaling", False):
        return None
    factor = values.get("rope_scaling_factor", MEGATRON_SCALING.factor)
    if factor != MEGATRON_SCALING.factor:
        raise ConfigError(
            f"{where}: args.rope_scaling_factor is {factor!r}, but Megatron-LM's GPT script builds the model with "
            f"{MEGATRON_SCALING.factor:g} whatever it says: if another script built this model, {WAY_OUT}"
        )
    return MEGATRON_SCALING
