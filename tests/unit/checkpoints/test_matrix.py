"""Every family in many shapes: round trip bit-equal, logits equal to transformers', over tensor and pipeline ranks."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_multiverse.checkpoints.formats.hf import HFSource
from megatron_multiverse.checkpoints.formats.hf_safetensors import HFReader
from megatron_multiverse.checkpoints.reference_logits import (
    MASKS,
    Inputs,
    Job,
    Logits,
    fixed_inputs,
    parallel_logits,
    relative_error,
    transformers_logits,
)
from megatron_multiverse.checkpoints.verify import same_bits
from megatron_multiverse.errors import ConfigError
from tests.unit.checkpoints.hf_folders import SHAPE, mcore_tensors, save_hf_model
from tests.unit.checkpoints.test_names import split_again

LLAMA31 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
SHORT = {"original_max_position_embeddings": 128}
LLAMA32 = LLAMA31 | SHORT | {"factor": 32.0}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
SMALL_BASE = {"rope_type": "default", "rope_theta": 500.0}
BIASED = {"attention_bias": True, "mlp_bias": True}
TIED, UNTIED = {"tie_word_embeddings": True}, {"tie_word_embeddings": False}


def heads(query: int, groups: int, width: int | None = None, hidden: int = 32) -> dict[str, Any]:
    shape = {"num_attention_heads": query, "num_key_value_heads": groups, "hidden_size": hidden}
    return shape if width is None else shape | {"head_dim": width}


CASES: dict[str, tuple[str, Mapping[str, Any]]] = {
    "qwen2-tied": ("qwen2", TIED),
    "qwen2-untied": ("qwen2", UNTIED),
    "qwen2-14-heads-2-groups": ("qwen2", TIED | heads(14, 2, hidden=56)),
    "qwen2-as-many-groups": ("qwen2", UNTIED | heads(6, 6, hidden=48)),
    "qwen2-3-heads-1-group": ("qwen2", UNTIED | heads(3, 1, hidden=48)),
    "qwen2-8-heads-2-groups": ("qwen2", TIED | heads(8, 2)),
    "qwen2-wide-heads": ("qwen2", TIED | heads(4, 2, 24)),
    "qwen2-odd-vocabulary": ("qwen2", UNTIED | {"vocab_size": 321}),
    "qwen2-odd-vocabulary-tied": ("qwen2", TIED | {"vocab_size": 321}),
    "qwen2-bf16": ("qwen2", UNTIED | {"dtype": torch.bfloat16}),
    "qwen2-linear-scaling": ("qwen2", TIED | {"rope_parameters": LINEAR}),
    "qwen3-tied": ("qwen3", TIED | {"head_dim": 8}),
    "qwen3-untied": ("qwen3", UNTIED | {"head_dim": 8}),
    "qwen3-wide-heads": ("qwen3", TIED | heads(4, 2, 16)),
    "qwen3-narrow-heads": ("qwen3", UNTIED | heads(4, 4, 6)),
    "qwen3-5-heads": ("qwen3", TIED | heads(5, 5, 8, hidden=40)),
    "qwen3-10-heads-2-groups": ("qwen3", UNTIED | heads(10, 2, 8, hidden=40)),
    "qwen3-8-heads-1-group": ("qwen3", UNTIED | heads(8, 1, 8)),
    "qwen3-4-layers": ("qwen3", TIED | {"head_dim": 8, "num_hidden_layers": 4}),
    "qwen3-bf16-tied": ("qwen3", TIED | {"head_dim": 8, "dtype": torch.bfloat16}),
    "llama-tied": ("llama", TIED),
    "llama-untied": ("llama", UNTIED),
    "llama-3.1-scaling": ("llama", UNTIED | heads(4, 2, 16) | {"rope_parameters": LLAMA31 | SHORT}),
    "llama-3.2-scaling-tied": ("llama", TIED | heads(4, 2, 32) | {"rope_parameters": LLAMA32}),
    "llama-linear-scaling": ("llama", UNTIED | {"rope_parameters": LINEAR}),
    "llama-7-heads": ("llama", UNTIED | heads(7, 7, hidden=56)),
    "llama-wide-heads": ("llama", UNTIED | heads(6, 2, 10, hidden=48)),
    "llama-8-heads-2-groups-biases": ("llama", UNTIED | BIASED | heads(8, 2, 8)),
    "llama-odd-ffn": ("llama", TIED | {"intermediate_size": 51}),
    "llama-loose-norm": ("llama", UNTIED | {"rms_norm_eps": 1e-3, "rope_parameters": SMALL_BASE}),
    "llama-biases": ("llama", UNTIED | BIASED),
    "llama-biases-tied-wide-heads": ("llama", TIED | BIASED | heads(4, 2, 12)),
    "llama-fp16": ("llama", UNTIED | {"dtype": torch.float16}),
}  # fmt: skip
# What tensor parallelism cannot cut: heads, groups or the MLP are odd.
UNCUT = {"qwen2-3-heads-1-group", "qwen3-5-heads", "llama-7-heads", "llama-odd-ffn"}
# More tensor parallel ranks than key/value heads, as the small Qwen2.5 models need them.
FEW_GROUPS = {"qwen2-8-heads-2-groups", "qwen3-8-heads-1-group", "llama-8-heads-2-groups-biases"}
# Cut both ways. Tensor ranks cut weights alone and pipeline ranks deal out layers alone, so a few models tell.
BOTH_WAYS = {f"{family}-{head}" for family in ("qwen2", "qwen3", "llama") for head in ("tied", "untied")}


def sizes_of(name: str) -> list[tuple[int, int]]:
    tensor_parallel = [(2, 1)] * (name not in UNCUT) + [(4, 1)] * (name in FEW_GROUPS)
    return [(1, 1), (1, 2), *tensor_parallel] + [(2, 2)] * (name in BOTH_WAYS)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    for seed, (name, (family, changes)) in enumerate(CASES.items()):
        save_hf_model(root / name, family, seed=seed, **changes)
    return {name: root / name for name in CASES}


@pytest.fixture(scope="module")
def logits(folders: dict[str, Path]) -> dict[tuple[str, tuple[int, int]], Logits]:
    """All parallel sizes of all models; those with as many ranks share their processes."""
    keys = [(name, size) for name in CASES for size in sizes_of(name)]
    jobs = [Job(folders[name], *size, inputs_of(name)) for name, size in keys]
    return dict(zip(keys, parallel_logits(jobs), strict=True))


def inputs_of(name: str) -> Inputs:
    return fixed_inputs(range(CASES[name][1].get("vocab_size", SHAPE["vocab_size"])))


@pytest.mark.parametrize("name", CASES)
def test_round_trip_is_bit_equal(name: str, folders: dict[str, Path]) -> None:
    reader = HFReader(folders[name])
    source = HFSource(folders[name])
    back = split_again(mcore_tensors(folders[name]), source.config, source.family)
    assert back.keys() == reader.names()
    for tensor_name, tensor in back.items():
        original = reader.read(tensor_name)
        assert tensor.dtype == original.dtype and same_bits(tensor, original), tensor_name


@pytest.mark.parametrize("name", CASES)
def test_logits_equal_transformers_at_all_parallel_sizes(
    name: str, folders: dict[str, Path], logits: dict[tuple[str, tuple[int, int]], Logits]
) -> None:
    want, noise = transformers_logits(folders[name], inputs_of(name))
    rows = want["causal"].shape[-1]
    for size in sizes_of(name):
        for mask in MASKS:
            got = logits[name, size][mask]
            assert got[..., rows:].abs().max() == 0 if got.shape[-1] > rows else True
            assert relative_error(want[mask], got[..., :rows]) <= 5 * noise, (size, mask)
    assert noise < 1e-6
    assert relative_error(want["causal"], want["multiverse"]) > 1e4 * noise  # the masks do differ


UNSUPPORTED: dict[str, tuple[str, dict[str, Any], str]] = {
    "experts": ("qwen2", {"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"]}, "qwen3_moe"),
    "mixtral": ("llama", {"num_local_experts": 8}, "num_experts"),
    "sliding window": ("qwen2", {"use_sliding_window": True, "sliding_window": 64}, "use_sliding_window"),
    "sliding layers": ("qwen2", {"layer_types": ["full_attention", "sliding_attention"]}, "use_sliding_window"),
    "o_proj bias": ("llama", {"attention_bias": True}, "attention_bias"),
    "mlp bias": ("llama", {"mlp_bias": True}, "mlp_bias"),
    "activation": ("llama", {"hidden_act": "gelu"}, "hidden_act"),
    "yarn": ("qwen2", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0}}, "yarn"),
    "quantised": ("qwen2", {"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
    "another family": ("llama", {"model_type": "gemma2", "architectures": ["Gemma2ForCausalLM"]}, "gemma2"),
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_unsupported_models_are_refused_by_name(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    family, changes, said = UNSUPPORTED[name]
    config = json.loads((folders[f"{family}-untied"] / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(ConfigError, match=said):
        HFSource(tmp_path)
