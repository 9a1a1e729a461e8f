"""config.json of Hugging Face <-> ModelConfig.

A key is understood, known not to change what the model computes, or refused by name: whatever it may ask for, our
model would not do it. Defaults are those of transformers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_multiverse.checkpoints.formats.hf_config_keys import REQUIRED, UNDERSTOOD, WITHOUT_EFFECT
from megatron_multiverse.checkpoints.formats.json_files import read_json_object
from megatron_multiverse.checkpoints.names.registry import FAMILIES
from megatron_multiverse.checkpoints.names.table import Family
from megatron_multiverse.config import ModelConfig, RopeScaling
from megatron_multiverse.errors import CheckpointError, ConfigError

SUPPORTED = (
    "dense models with full causal attention, SwiGLU, no biases but those of the family, unquantised, can be converted"
)
DEFAULT_THETA = 1e4
"""Rotary base of a config.json that names none, in every family."""
NEEDED = {"linear": ("factor",), "llama3": ("factor", "low_freq_factor", "high_freq_factor")}
"""Rotary scalings, and what each must say of itself."""


def read_hf_config(folder: str | Path) -> dict[str, Any]:
    """config.json of a Hugging Face folder as a dict.

    Raises:
        CheckpointError: it is missing or no JSON object.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{folder} has no config.json: a Hugging Face model folder has one beside its weights")
    return read_json_object(path)


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
        ConfigError: a key is missing, mistyped or unknown, or asks for something that megatron-core's dense model here
            does not do (experts, sliding windows, further biases, other activations, other rotary scalings,
            quantisation).
    """
    family = family_of(hf_config)
    values: dict[str, Any] = {**dict(family.defaults), **{k: v for k, v in hf_config.items() if v is not None}}
    missing = [key for key in REQUIRED if key not in values]
    if missing:
        raise ConfigError(f"config.json lacks {', '.join(missing)}; a {family.architecture} needs them")
    biased = family.add_bias_linear and bool(values.get("attention_bias") and values.get("mlp_bias"))
    _refuse_unsupported(values, family, biased)
    _refuse_unknown(values)
    hidden, heads = _whole(values, "hidden_size"), _whole(values, "num_attention_heads")
    if hf_config.get("num_key_value_heads", values.get("num_key_value_heads")) is None:
        values["num_key_value_heads"] = heads  # what null means; the family's default is for an absent key
    if "head_dim" not in values and hidden % heads:
        raise ConfigError(f"hidden_size ({hidden}) is no multiple of num_attention_heads ({heads})")
    theta, scaling = _rotary(values)
    return ModelConfig(
        num_layers=_whole(values, "num_hidden_layers"),
        hidden_size=hidden,
        ffn_hidden_size=_whole(values, "intermediate_size"),
        num_attention_heads=heads,
        num_query_groups=_whole(values, "num_key_value_heads"),
        kv_channels=_whole(values, "head_dim") if "head_dim" in values else hidden // heads,
        vocab_size=_whole(values, "vocab_size"),
        max_sequence_length=_whole(values, "max_position_embeddings"),
        rotary_base=theta,
        rope_scaling=scaling,
        layernorm_epsilon=_number(values, "rms_norm_eps"),
        add_qkv_bias=family.add_qkv_bias,
        add_bias_linear=biased,
        qk_layernorm=family.qk_layernorm,
        share_embeddings_and_output_weights=_switch(values, "tie_word_embeddings"),
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
        **hf_rotary(config),
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


def hf_rotary(config: ModelConfig) -> dict[str, Any]:
    """The keys rope_theta and rope_scaling: transformers 4 knows no others, and transformers 5 reads them too."""
    return {"rope_theta": config.rotary_base, "rope_scaling": _hf_scaling(config.rope_scaling)}


def _refuse_unsupported(values: Mapping[str, Any], family: Family, biased: bool) -> None:
    layer_types = values.get("layer_types") or []
    if not isinstance(layer_types, list):
        raise ConfigError(f"config.json's layer_types is {layer_types!r}, expected a list")
    window = values.get("sliding_window")
    sliding = values.get("use_sliding_window", False) or any(kind != "full_attention" for kind in layer_types)
    # Qwen2's class has biases on query, key and value, and nowhere else, whatever attention_bias says.
    allowed_bias = biased or family.add_qkv_bias
    refused = {
        "num_experts": values.get("num_experts") or values.get("num_local_experts"),
        "use_sliding_window": sliding and (window or True),
        "attention_bias": values.get("attention_bias") and not allowed_bias,
        "mlp_bias": values.get("mlp_bias") and not biased,
        "quantization_config": values.get("quantization_config"),
        "hidden_act": values.get("hidden_act", "silu") not in ("silu", "swish") and values["hidden_act"],
        "partial_rotary_factor": values.get("partial_rotary_factor", 1.0) != 1.0 and values["partial_rotary_factor"],
    }
    for key, value in refused.items():
        if value:
            raise ConfigError(f"config.json sets {key} ({value!r}), which is not supported: {SUPPORTED}")


def _refuse_unknown(values: Mapping[str, Any]) -> None:
    """Refuse what is set (not null, false, zero or empty) and stands in neither table."""
    for key, value in values.items():
        if value and key not in UNDERSTOOD | WITHOUT_EFFECT and not key.endswith("_token_id"):
            raise ConfigError(
                f"config.json sets {key} ({value!r}), which is not known here and may change what the model computes: "
                f"{SUPPORTED}. If it changes nothing, remove it from config.json"
            )


def _rotary(values: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    """Base and scaling, from transformers 5's rope_parameters or the older rope_theta and rope_scaling."""
    found = [_one_rotary(values, key) for key in ("rope_scaling", "rope_parameters") if values.get(key)]
    if "rope_theta" in values or not found:
        theta = _number(values, "rope_theta") if "rope_theta" in values else DEFAULT_THETA
        found.append((theta, found[0][1] if found else None))
    if any(one != found[0] for one in found):
        raise ConfigError(
            "config.json contradicts itself about the rotary embedding: rope_theta, rope_scaling and rope_parameters "
            f"say {' and '.join(str(one) for one in found)}; readers differ in which they take, so correct it"
        )
    return found[0]


def _one_rotary(values: Mapping[str, Any], key: str) -> tuple[float, RopeScaling | None]:
    """Base and scaling as one of the two keys tells them."""
    if not isinstance(values[key], Mapping):
        raise ConfigError(f"config.json's {key} is {values[key]!r}, expected an object")
    rope = {name: value for name, value in values[key].items() if value is not None}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", *NEEDED):
        raise ConfigError(
            f"config.json asks for rope scaling {kind!r}, supported: default, {', '.join(NEEDED)}; "
            "remove rope_scaling from config.json to convert the model for its original context length"
        )
    known = {field.name for field in dataclasses.fields(RopeScaling)} | {"type", "rope_theta", "partial_rotary_factor"}
    refused = [name for name in rope if name not in known]
    refused += ["partial_rotary_factor"] * (rope.get("partial_rotary_factor", 1.0) != 1.0)
    if refused:
        raise ConfigError(f"config.json's {key} has {refused[0]} ({rope[refused[0]]!r}), which is not supported here")
    theta = _number({"rope_theta": DEFAULT_THETA, **values, **rope}, "rope_theta")
    if kind == "default":
        return theta, None
    if absent := [name for name in NEEDED[kind] if name not in rope]:
        raise ConfigError(f"config.json's rope scaling {kind!r} lacks {', '.join(absent)}")
    factor = _number(rope, "factor")
    if kind == "linear":
        return theta, RopeScaling(rope_type="linear", factor=factor)
    low, high = _number(rope, "low_freq_factor"), _number(rope, "high_freq_factor")
    name = "original_max_position_embeddings"
    # transformers asks the model's own key first, then the scaling's, then takes the longest sequence.
    length = _whole({name: values.get(name, rope.get(name, values["max_position_embeddings"]))}, name)
    return theta, RopeScaling(
        rope_type="llama3",
        factor=factor,
        low_freq_factor=low,
        high_freq_factor=high,
        original_max_position_embeddings=length,
    )


def _hf_scaling(scaling: RopeScaling | None) -> dict[str, Any] | None:
    if scaling is None:
        return None
    values = dataclasses.asdict(scaling)
    return values if scaling.rope_type == "llama3" else {k: values[k] for k in ("rope_type", "factor")}


def _whole(values: Mapping[str, Any], key: str) -> int:
    value = values[key]
    if type(value) is not int or value < 1:
        raise ConfigError(f"config.json's {key} is {value!r}, expected a whole number of at least 1")
    return value


def _number(values: Mapping[str, Any], key: str) -> float:
    value = values[key]
    if type(value) not in (int, float) or not 0 < value < float("inf"):
        raise ConfigError(f"config.json's {key} is {value!r}, expected a positive number")
    return float(value)


def _switch(values: Mapping[str, Any], key: str) -> bool:
    value = values.get(key, False)
    if type(value) is not bool:
        raise ConfigError(f"config.json's {key} is {value!r}, expected true or false")
    return value
