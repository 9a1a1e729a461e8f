from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from megatron_multiverse.config import ModelConfig, RopeScaling
from megatron_multiverse.errors import ConfigError
from megatron_multiverse.model.attention import LayoutParams
from megatron_multiverse.model.families import llama3, qwen2, qwen3
from megatron_multiverse.model.gpt import build_gpt_model
from tests.copied_weights import copy_weights

from .hf import hf_model, mcore_weights

SHAPE = {
    "num_layers": 3, "hidden_size": 64, "ffn_hidden_size": 96, "num_attention_heads": 8,
    "num_query_groups": 2, "vocab_size": 128, "max_sequence_length": 64,
}  # fmt: skip
CASES = {
    "qwen2": ("qwen2", qwen2(**SHAPE, share_embeddings_and_output_weights=False)),
    "qwen2-tied": ("qwen2", qwen2(**SHAPE)),
    "qwen3": ("qwen3", qwen3(**SHAPE, kv_channels=16)),
    "llama": ("llama", llama3(**SHAPE, share_embeddings_and_output_weights=False)),
}


def random_batch(seed: int, b: int = 2, s: int = 24) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 128, (b, s), generator=generator)
    position_ids = torch.randint(0, 40, (b, s), generator=generator)
    r = torch.stack([torch.randperm(s, generator=generator) for _ in range(b)]).int()
    return ids, position_ids, r


def oracle_mask(r: torch.Tensor) -> torch.Tensor:
    """The rule spelled out token by token."""
    b, s = r.shape
    mask = torch.zeros(b, 1, s, s, dtype=torch.bool)
    for n in range(b):
        for i in range(s):
            for j in range(i + 1):
                mask[n, 0, i, j] = r[n, j] <= r[n, i]
    return mask


@pytest.mark.parametrize("name", CASES)
def test_logits_equal_transformers(name: str) -> None:
    family, config = CASES[name]
    torch.manual_seed(0)
    hf = hf_model(family, config)
    model = build_gpt_model(config)
    copy_weights(model, mcore_weights(hf, config))
    ids, position_ids, r = random_batch(1)
    with torch.no_grad():
        want = hf(input_ids=ids, position_ids=position_ids, attention_mask=oracle_mask(r)).logits
        got = model(ids, position_ids, None, packed_seq_params=LayoutParams.from_labels(r))
        other_r = model(ids, position_ids, None, packed_seq_params=LayoutParams.causal(ids))
        other_ids = model(ids, position_ids.flip(1), None, packed_seq_params=LayoutParams.from_labels(r))
    torch.testing.assert_close(got, want, rtol=0, atol=1e-6)
    assert (other_r - want).abs().max() > 1e-3  # the comparison can see a wrong mask
    assert (other_ids - want).abs().max() > 1e-3  # and wrong positions


def test_float64_is_float64_throughout() -> None:
    config = CASES["qwen3"][1]
    model = build_gpt_model(config, dtype=torch.float64)
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    ids, position_ids, r = random_batch(2, b=1)
    with torch.no_grad():
        alone = model(ids, position_ids, None, packed_seq_params=LayoutParams.from_labels(r))
        twice = model(
            ids.repeat(2, 1),
            position_ids.repeat(2, 1),
            None,
            packed_seq_params=LayoutParams.from_labels(r.repeat(2, 1)),
        )
        moved = model(ids, position_ids + 100, None, packed_seq_params=LayoutParams.from_labels(r))
    assert alone.dtype == torch.float64
    torch.testing.assert_close(twice[1:], alone, rtol=0, atol=1e-12)
    torch.testing.assert_close(moved, alone, rtol=0, atol=1e-11)  # rotary depends on differences alone


def test_gradients_equal_transformers() -> None:
    family, config = CASES["qwen3"]
    torch.manual_seed(0)
    hf = hf_model(family, config)
    model = build_gpt_model(config)
    copy_weights(model, mcore_weights(hf, config))
    ids, position_ids, r = random_batch(3)
    logits = hf(input_ids=ids, position_ids=position_ids, attention_mask=oracle_mask(r)).logits
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids.roll(-1, 1).flatten()).backward()
    loss = model(ids, position_ids, None, packed_seq_params=LayoutParams.from_labels(r), labels=ids.roll(-1, 1)).mean()
    loss.backward()
    torch.testing.assert_close(
        model.embedding.word_embeddings.weight.grad, hf.model.embed_tokens.weight.grad, rtol=0, atol=1e-6
    )
    norm = [torch.cat([p.grad.flatten() for p in m.parameters()]).norm() for m in (model, hf)]
    torch.testing.assert_close(norm[0], norm[1], rtol=1e-5, atol=0)


def test_seed_decides_the_weights_and_leaves_the_generator_alone() -> None:
    config = CASES["qwen2"][1]
    before = torch.get_rng_state()
    states = [build_gpt_model(config, seed=seed).state_dict() for seed in (5, 5, 6)]
    assert torch.equal(before, torch.get_rng_state())
    name = "decoder.layers.0.mlp.linear_fc1.weight"
    assert torch.equal(states[0][name], states[1][name])
    assert not torch.equal(states[0][name], states[2][name])
    assert sum(p.numel() for p in build_gpt_model(config).parameters()) == config.num_parameters


def test_wrong_calls_are_explained() -> None:
    config = CASES["qwen2"][1]
    model = build_gpt_model(config)
    ids, position_ids, r = random_batch(4)
    with pytest.raises(ConfigError, match="LayoutParams"):
        model(ids, position_ids, None)
    with pytest.raises(ConfigError, match=r"\(2, 24, 24\), got \(2, 23, 23\)"):
        model(ids, position_ids, None, packed_seq_params=LayoutParams.from_labels(r[:, :-1]))
    with pytest.raises(ConfigError, match="unknown attention_backend 'flesh'"):
        model(ids, position_ids, None, packed_seq_params=LayoutParams.from_labels(r, backend="flesh"))


def test_llama_scaling_and_biases_everywhere_equal_transformers() -> None:
    """Also covers frequencies on both sides of the blend: head width 32, short original length."""
    shape = {**SHAPE, "num_layers": 2, "kv_channels": 32, "max_sequence_length": 512}
    scaling = RopeScaling(rope_type="llama3", factor=8.0, original_max_position_embeddings=256)
    config = llama3(**shape, rope_scaling=scaling, add_bias_linear=True)
    torch.manual_seed(0)
    rope = {"rope_type": "llama3", "rope_theta": config.rotary_base, **dataclasses.asdict(scaling)}
    hf = hf_model("llama", config, rope_parameters=rope, attention_bias=True, mlp_bias=True)
    assert sum(p.numel() for p in hf.parameters()) == config.num_parameters
    model = build_gpt_model(config)
    weights = mcore_weights(hf, config)
    copy_weights(model, weights)
    ids, position_ids, r = random_batch(5)
    with torch.no_grad():
        want = hf(input_ids=ids, position_ids=position_ids, attention_mask=oracle_mask(r)).logits
        got = model(ids, position_ids, None, packed_seq_params=LayoutParams.from_labels(r))
        plain = build_gpt_model(dataclasses.replace(config, rope_scaling=None))
        copy_weights(plain, weights)
        unscaled = plain(ids, position_ids, None, packed_seq_params=LayoutParams.from_labels(r))
    torch.testing.assert_close(got, want, rtol=0, atol=1e-6)
    assert (unscaled - want).abs().max() > 3e-5


def test_a_config_with_scaling_survives_json(tmp_path: Path) -> None:
    config = llama3(**SHAPE, rope_scaling=RopeScaling(rope_type="llama3", factor=32.0))
    config.to_json(tmp_path / "config.json")
    assert ModelConfig.from_json(tmp_path / "config.json") == config
    with pytest.raises(ConfigError, match="low_freq_factor"):
        RopeScaling(rope_type="llama3", factor=8.0, low_freq_factor=5.0)
