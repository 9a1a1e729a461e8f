from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_multiverse.checkpoints.formats.hf_config import (
    hf_config_to_model_config,
    model_config_to_hf,
    read_hf_config,
)
from megatron_multiverse.checkpoints.names.registry import FAMILIES
from megatron_multiverse.checkpoints.names.rules import split
from megatron_multiverse.checkpoints.names.table import Family, entries
from megatron_multiverse.config import ModelConfig
from tests.unit.checkpoints.hf_folders import mcore_tensors
from tests.unit.model.hf import hf_model, mcore_weights


def shape(tied: bool, **changes: object) -> ModelConfig:
    values = {
        "num_layers": 2,
        "hidden_size": 36,
        "ffn_hidden_size": 48,
        "num_attention_heads": 6,
        "num_query_groups": 3,
        "kv_channels": 10,
        "vocab_size": 50,
        "max_sequence_length": 64,
        "share_embeddings_and_output_weights": tied,
    }
    return ModelConfig(**{**values, **changes})


def split_again(state: dict[str, torch.Tensor], config: ModelConfig, family: Family) -> dict[str, torch.Tensor]:
    """The Hugging Face tensors of megatron-core's, by name."""
    plan = {entry.mcore: entry for entry in entries(family, config)}
    assert state.keys() == plan.keys()
    parts = ((plan[name].hf, split(plan[name], tensor, config)) for name, tensor in state.items())
    return {name: part for names, tensors in parts for (name, _), part in zip(names, tensors, strict=True)}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", FAMILIES)
def test_merging_and_splitting_are_inverse_and_equal_the_reference(tmp_path: Path, name: str, tied: bool) -> None:
    family = FAMILIES[name]
    given = shape(tied, add_qkv_bias=family.add_qkv_bias, qk_layernorm=family.qk_layernorm)
    model = hf_model(family.model_type, given)
    model.save_pretrained(tmp_path)
    config = hf_config_to_model_config(read_hf_config(tmp_path))
    assert config == given
    state = mcore_tensors(tmp_path)
    reference = mcore_weights(model, config)
    assert state.keys() == reference.keys()
    for key, tensor in reference.items():
        assert torch.equal(state[key], tensor), key
    back = split_again(state, config, family)
    original = load_file(tmp_path / "model.safetensors")
    assert back.keys() == original.keys()
    for key, tensor in original.items():
        assert torch.equal(back[key], tensor), key


@pytest.mark.parametrize("name", FAMILIES)
def test_a_table_names_every_tensor_once(name: str) -> None:
    config = shape(False, add_qkv_bias=name == "qwen2", qk_layernorm=name == "qwen3")
    plan = entries(FAMILIES[name], config)
    hf = [n for entry in plan for n, _ in entry.hf]
    assert len(set(hf)) == len(hf) and len({e.mcore for e in plan}) == len(plan)
    from transformers import AutoConfig, AutoModelForCausalLM

    hf_config = AutoConfig.for_model(**model_config_to_hf(config, FAMILIES[name]))
    with torch.device("meta"):
        expected = AutoModelForCausalLM.from_config(hf_config).state_dict()
    assert {n: tuple(t.shape) for n, t in expected.items()} == {n: s for e in plan for n, s in e.hf}
