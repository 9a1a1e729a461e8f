"""config.json of Hugging Face <-> ModelConfig. Settings that our model lacks are refused by name."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_multiverse.checkpoints.names.registry import FAMILIES
from megatron_multiverse.checkpoints.names.table import Family
from megatron_multiverse.config import ModelConfig, RopeScaling
from megatron_multiverse.errors import CheckpointError, ConfigError

REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


def read_hf_config(folder: str | Path) -> dict[str, Any]:
    """config.json of a Hugging Face folder as a dict.

    Raises:
        CheckpointError: it is missing or no JSON object.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{folder} has no config.json: a Hugging Face model folder has one beside its weights")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}): download it again") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} holds {type(values).__name__}, expected a JSON object")
    return values


def family_of(hf_config: Mapping[str, Any]) -> Family:
    """The family of a Hugging Face config.

    Raises:
        ConfigError: the architecture is not one of ours, with what is supported.
    """
    model_type, names = hf_config.get("model_type"), hf_config.get("architectures") or []
    for family in FAMILIES.values():
        if family.model_type == model_type and (not names or family.architecture in names):
            return family
    supported = ", ".join(f"{f.architecture} (model_type {f.model_type})" for f in FAMILIES.values())
    raise ConfigError(
        f"config.json describes {names or 'no architecture'} with model_type {model_type!r}, which cannot be "
        f"converted; supported: {supported}"
    )


def hf_config_to_model_config(hf_config: Mapping[str, Any]) -> ModelConfig:
    """The shape that a Hugging Face config describes.

    Raises:
        ConfigError: a key is missing, or asks for something that megatron-core's dense model here does not do
            (experts, sliding windows, further biases, other activations, other rotary scalings, quantisation).
    """
    family = family_of(hf_config)
    values = {**dict(family.defaults), **{k: v for k, v in hf_config.items() if v is not None}}
    missing = [key for key in REQUIRED if key not in values]
    if missing:
        raise ConfigError(f"config.json lacks {', '.join(missing)}; a {family.architecture} needs them")
    biased = family.add_bias_linear and bool(values.get("attention_bias") and values.get("mlp_bias"))
    _refuse_unsupported(values, biased)
    heads = values["num_attention_heads"]
    theta, scaling = _rotary(values)
    if "head_dim" not in values and values["hidden_size"] % heads:
        raise ConfigError(f"hidden_size ({values['hidden_size']}) is no multiple of num_attention_heads ({heads})")
    return ModelConfig(
        num_layers=values["num_hidden_layers"],
        hidden_size=values["hidden_size"],
        ffn_hidden_size=values["intermediate_size"],
        num_attention_heads=heads,
        num_query_groups=values.get("num_key_value_heads", 32 if family.name == "qwen3" else heads),
        kv_channels=values.get("head_dim", values["hidden_size"] // heads),
        vocab_size=values["vocab_size"],
        max_sequence_length=values["max_position_embeddings"],
        rotary_base=float(theta),
        rope_scaling=scaling,
        layernorm_epsilon=float(values["rms_norm_eps"]),
        add_qkv_bias=family.add_qkv_bias,
        add_bias_linear=biased,
        qk_layernorm=family.qk_layernorm,
        share_embeddings_and_output_weights=bool(values.get("tie_word_embeddings", False)),
    )


def model_config_to_hf(config: ModelConfig, family: Family, *, dtype: str = "bfloat16") -> dict[str, Any]:
    """config.json of the model, readable by transformers 4 and 5.

    Args:
        config: the shape; vocab_size as the Hugging Face side shall have it.
        family: its family; must agree with the config's biases and norms.
        dtype: dtype of the weights, a torch name.

    Raises:
        ConfigError: the family has no such biases or norms.
    """
    for key in ("add_qkv_bias", "qk_layernorm"):
        if getattr(config, key) != getattr(family, key):
            raise ConfigError(
                f"the model has {key}={getattr(config, key)}, {family.architecture} has {getattr(family, key)}: "
                "choose another --family"
            )
    values: dict[str, Any] = {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.ffn_hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_query_groups,
        "head_dim": config.kv_channels,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_sequence_length,
        "rms_norm_eps": config.layernorm_epsilon,
        "rope_theta": config.rotary_base,
        "rope_scaling": _hf_scaling(config.rope_scaling),
        "tie_word_embeddings": config.share_embeddings_and_output_weights,
        "attention_dropout": 0.0,
        "torch_dtype": dtype,
        "use_cache": True,
    }
    if family.add_bias_linear:
        values |= {"attention_bias": config.add_bias_linear, "mlp_bias": config.add_bias_linear}
    elif config.add_bias_linear:
        raise ConfigError(f"the model has biases on every linear layer, {family.architecture} has none")
    return {**values, **dict(family.extra)}


def _refuse_unsupported(values: Mapping[str, Any], biased: bool) -> None:
    layer_types = values.get("layer_types") or []
    window = values.get("sliding_window")
    sliding = values.get("use_sliding_window", False) or "sliding_attention" in layer_types
    refused = {
        "num_experts": values.get("num_experts") or values.get("num_local_experts"),
        "use_sliding_window": sliding and (window or True),
        "attention_bias": values.get("attention_bias") and not biased,
        "mlp_bias": values.get("mlp_bias") and not biased,
        "quantization_config": values.get("quantization_config"),
        "partial_rotary_factor": (values.get("rope_parameters") or values).get("partial_rotary_factor", 1.0) != 1.0,
        "hidden_act": values.get("hidden_act", "silu") != "silu" and values["hidden_act"],
    }
    for key, value in refused.items():
        if value:
            raise ConfigError(
                f"config.json sets {key} ({value!r}), which is not supported: dense models with full causal "
                "attention, SwiGLU, no biases but those of the family, unquantised, can be converted"
            )


def _rotary(values: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    """Base and scaling, from transformers 5's rope_parameters or the older rope_theta and rope_scaling."""
    rope = dict(values.get("rope_scaling") or {}) | dict(values.get("rope_parameters") or {})
    kind = rope.get("rope_type", rope.get("type", "default"))
    theta = rope.get("rope_theta", values["rope_theta"])
    if kind == "default":
        return theta, None
    if kind not in ("linear", "llama3"):
        raise ConfigError(
            f"config.json asks for rope scaling {kind!r}, supported: default, linear, llama3; "
            "remove rope_scaling from config.json to convert the model for its original context length"
        )
    names = {field.name for field in dataclasses.fields(RopeScaling)}
    given = {key: value for key, value in rope.items() if key in names}
    if "factor" not in given:
        raise ConfigError(f"config.json's rope scaling {kind!r} lacks factor")
    numbers = {k: int(v) if k.startswith("original") else float(v) for k, v in given.items() if k != "rope_type"}
    return theta, RopeScaling(rope_type=kind, **numbers)  # type: ignore[arg-type]


def _hf_scaling(scaling: RopeScaling | None) -> dict[str, Any] | None:
    if scaling is None:
        return None
    values = dataclasses.asdict(scaling)
    return values if scaling.rope_type == "llama3" else {k: values[k] for k in ("rope_type", "factor")}
