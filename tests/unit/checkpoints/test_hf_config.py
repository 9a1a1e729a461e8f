"""config.json: what is understood, what has no effect, and what is refused, held against transformers' own reading."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_multiverse.checkpoints.formats.hf import HFSource
from megatron_multiverse.checkpoints.formats.hf_config import hf_config_to_model_config
from megatron_multiverse.config import RopeScaling
from megatron_multiverse.errors import CheckpointError, ConfigError
from tests.unit.checkpoints.hf_folders import SHAPE, save_hf_model

LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **SHAPE}
QWEN2 = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], **SHAPE}
QWEN3 = {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], **SHAPE}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


def without(values: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key not in keys}


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "dual chunk attention": (
        {**QWEN2, "dual_chunk_attention_config": {"chunk_size": 262144}}, "sets dual_chunk_attention_config"
    ),
    "capped logits": ({**QWEN2, "final_logit_softcapping": 30.0}, r"sets final_logit_softcapping \(30.0\)"),
    "scaled residuals": ({**LLAMA, "residual_multiplier": 0.22}, "sets residual_multiplier"),
    "other weights": ({**LLAMA, "transformers_weights": "ema.safetensors"}, "sets transformers_weights"),
    "own code": ({**LLAMA, "auto_map": {"AutoModelForCausalLM": "modeling.Mine"}}, "sets auto_map"),
    "layers without rotation": ({**LLAMA, "no_rope_layers": [1, 0]}, "sets no_rope_layers"),
    "half rotation": ({**LLAMA, "partial_rotary_factor": 0.5}, r"sets partial_rotary_factor \(0.5\)"),
    "half rotation in rope_parameters": (
        {**LLAMA, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
        r"has partial_rotary_factor \(0.5\)",
    ),
    "sections": ({**LLAMA, "rope_scaling": {"rope_type": "default", "mrope_section": [2, 2]}}, "has mrope_section"),
    "llama3 without factors": ({**LLAMA, "rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
                               "'llama3' lacks low_freq_factor, high_freq_factor"),
    "linear without factor": ({**LLAMA, "rope_scaling": {"rope_type": "linear"}}, "'linear' lacks factor"),
    "two bases": ({**LLAMA, "rope_theta": 1e4, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
                  "contradicts itself about the rotary embedding"),
    "two scalings": (
        {**LLAMA, "rope_scaling": {"rope_type": "linear", "factor": 2.0}, "rope_parameters": {"rope_type": "default"}},
        "contradicts itself",
    ),
    "null": (without(LLAMA, "hidden_size") | {"hidden_size": None}, "lacks hidden_size"),
    "float": ({**LLAMA, "num_hidden_layers": 2.5}, r"num_hidden_layers is 2.5, expected a whole number"),
    "zero": ({**LLAMA, "num_attention_heads": 0}, "num_attention_heads is 0, expected a whole number of at least 1"),
    "text": ({**LLAMA, "rms_norm_eps": "1e-6"}, "rms_norm_eps is '1e-6', expected a positive number"),
    "infinity": ({**LLAMA, "rope_theta": float("inf")}, "rope_theta is inf, expected a positive number"),
    "text for a switch": ({**LLAMA, "tie_word_embeddings": "false"}, "tie_word_embeddings is 'false', expected true"),
    "rope as a list": ({**LLAMA, "rope_scaling": [1]}, r"rope_scaling is \[1\], expected an object"),
    "layer types as text": ({**LLAMA, "layer_types": "full"}, "layer_types is 'full', expected a list"),
    "bias on qwen3": ({**QWEN3, "attention_bias": True}, "sets attention_bias"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_understood_is_refused_by_name(name: str) -> None:
    values, message = REFUSED[name]
    with pytest.raises(ConfigError, match=message):
        hf_config_to_model_config(values)


def test_keys_without_effect_and_unset_ones_pass() -> None:
    harmless = {
        "attention_dropout": 0.1, "initializer_range": 0.02, "use_cache": True, "pretraining_tp": 2, "temperature": 0.6,
        "bos_token_id": 1, "eos_token_id": [1, 2], "transformers_version": "5.0", "_name_or_path": "x",
        "id2label": {"0": "a"}, "quantization_config": None, "num_experts": 0, "use_mrope": False, "rope_scaling": None,
        "sliding_window": 4096, "use_sliding_window": False, "layer_types": ["full_attention"] * 2,
    }  # fmt: skip
    assert hf_config_to_model_config({**LLAMA, **harmless}) == hf_config_to_model_config(LLAMA)


EQUAL: dict[str, tuple[str, dict[str, Any]]] = {
    "swish is silu": ("llama", {"hidden_act": "swish"}),
    "qwen2 has its biases anyway": ("qwen2", {"attention_bias": True}),
    "as many groups as heads": ("llama", {"num_key_value_heads": None}),
    "no head_dim": ("llama", {"head_dim": None}),
    "scaling of the whole length": ("llama", {"rope_parameters": {**LLAMA3, "rope_theta": 1e4}}),
    "old form of linear scaling": ("llama", {"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 4}}),
    "byte order mark": ("qwen3", {}),
}


@torch.no_grad()
@pytest.mark.parametrize("name", EQUAL)
def test_what_passes_is_read_as_transformers_reads_it(name: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    from megatron_multiverse.checkpoints.load import load_checkpoint
    from megatron_multiverse.model.attention import LayoutParams

    family, changes = EQUAL[name]
    groups = {"num_key_value_heads": 4} if "num_key_value_heads" in changes else {}
    save_hf_model(tmp_path, family, tie_word_embeddings=True, **groups)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    ids = torch.randint(0, 300, (1, 200), generator=torch.Generator().manual_seed(0))
    want = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)(ids).logits
    if name == "byte order mark":  # transformers refuses it, so this comes after
        file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    model, _ = load_checkpoint(tmp_path)
    got = model.eval()(ids, torch.arange(200)[None], None, packed_seq_params=LayoutParams.causal(ids))
    assert float((want - got).abs().max() / want.abs().max()) < 1e-4


def test_defaults_are_those_of_transformers() -> None:
    from transformers import AutoConfig

    for values in (LLAMA, QWEN2, QWEN3):
        bare = without(values, "num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "architectures")
        bare |= {"num_attention_heads": 32, "hidden_size": 64}
        theirs = AutoConfig.for_model(**bare)
        ours = hf_config_to_model_config(bare)
        assert ours.num_query_groups == theirs.num_key_value_heads
        assert ours.kv_channels == (getattr(theirs, "head_dim", None) or 2)
        assert ours.max_sequence_length == theirs.max_position_embeddings
        assert ours.layernorm_epsilon == theirs.rms_norm_eps
        assert ours.share_embeddings_and_output_weights == theirs.tie_word_embeddings
    scaled = hf_config_to_model_config({**LLAMA, "rope_scaling": LLAMA3, "original_max_position_embeddings": 64})
    assert scaled.rope_scaling == RopeScaling(original_max_position_embeddings=64, **LLAMA3)


def test_damaged_config_files_are_named(tmp_path: Path) -> None:
    save_hf_model(tmp_path)
    for content, message in [
        (b"{", "config.json is not valid JSON"),
        (b"[]", "config.json holds list, expected a JSON object"),
        (b"\xff\xfe{", "config.json is not valid JSON"),
        (b"{}", "config.json describes no architecture"),
    ]:
        (tmp_path / "config.json").write_bytes(content)
        with pytest.raises((CheckpointError, ConfigError), match=message):
            HFSource(tmp_path)
