from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_multiverse.checkpoints.load import load_checkpoint
from megatron_multiverse.config import ModelConfig
from megatron_multiverse.errors import CheckpointError, ConfigError
from megatron_multiverse.model import weights
from megatron_multiverse.model.families import PRESETS, preset, qwen2
from megatron_multiverse.model.gpt import build_gpt_model
from megatron_multiverse.model.weights import copy_weights, save_model, weight_state


def tiny(tied: bool = True, vocab_size: int = 40) -> ModelConfig:
    return qwen2(
        num_layers=1, hidden_size=16, ffn_hidden_size=24, num_attention_heads=2, vocab_size=vocab_size,
        max_sequence_length=32, share_embeddings_and_output_weights=tied,
    )  # fmt: skip


@pytest.mark.parametrize("tied", [True, False])
def test_a_saved_model_loads_bit_equal(tmp_path: Path, tied: bool) -> None:
    model = build_gpt_model(tiny(tied), seed=3)
    save_model(model, tiny(tied), tmp_path / "model")
    loaded, config = load_checkpoint(tmp_path / "model")
    assert config == tiny(tied)
    files = sorted(p.name for p in (tmp_path / "model").iterdir())
    assert files == ["checksums.json", "config.json", "model.safetensors"]
    for name, tensor in weight_state(model).items():
        assert torch.equal(tensor, weight_state(loaded)[name]), name


@pytest.mark.parametrize(("owner", "name"), [(weights, "save_file"), (ModelConfig, "to_json"), (weights, "flush")])
def test_a_save_that_is_cut_off_leaves_the_old_model(tmp_path: Path, monkeypatch, owner: object, name: str) -> None:
    old = build_gpt_model(tiny(), seed=3)
    save_model(old, tiny(), tmp_path)
    original = getattr(owner, name)

    def dies(*args: object, **kwargs: object) -> None:
        original(*args, **kwargs)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, dies)
        with pytest.raises(KeyboardInterrupt):
            save_model(build_gpt_model(tiny(vocab_size=41)), tiny(vocab_size=41), tmp_path)
    loaded, config = load_checkpoint(tmp_path)
    assert config == tiny()
    for key, tensor in weight_state(old).items():
        assert torch.equal(tensor, weight_state(loaded)[key]), key


def test_dtype_on_disk_and_in_memory_are_free(tmp_path: Path) -> None:
    model = build_gpt_model(tiny())
    save_model(model, tiny(), tmp_path / "half", dtype=torch.bfloat16)
    save_model(model, tiny(), tmp_path / "full")
    sizes = [(tmp_path / f / "model.safetensors").stat().st_size for f in ("half", "full")]
    assert sizes[0] < 0.6 * sizes[1]
    loaded, _ = load_checkpoint(tmp_path / "half", dtype=torch.float64)
    for name, tensor in weight_state(model).items():
        assert torch.equal(weight_state(loaded)[name], tensor.bfloat16().double()), name


def test_weights_that_do_not_fit_are_refused_by_name(tmp_path: Path) -> None:
    save_model(build_gpt_model(tiny()), tiny(), tmp_path)
    tiny(vocab_size=41).to_json(tmp_path / "config.json")
    with pytest.raises(CheckpointError, match=r"word_embeddings.weight has shape \[40, 16\].*asks for \[41, 16\]"):
        load_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors"):
        load_checkpoint(tmp_path)


def test_presets_have_the_published_sizes() -> None:
    published = {
        "qwen2.5-0.5b": 494_032_768,
        "qwen2.5-1.5b": 1_543_714_304,
        "qwen2.5-7b": 7_615_616_512,
        "qwen2.5-32b": 32_763_876_352,
        "qwen3-0.6b": 596_049_920,
    }
    assert {name: preset(name).num_parameters for name in PRESETS if name != "tiny"} == published
    with pytest.raises(ConfigError, match="unknown model preset 'gpt5'"):
        preset("gpt5")


def test_copied_weights_keep_dtype_and_place() -> None:
    source, target = build_gpt_model(tiny(), seed=1), build_gpt_model(tiny(), seed=2, dtype=torch.bfloat16)
    held = weight_state(target)
    copy_weights(source, target)
    for name, tensor in weight_state(source).items():
        assert held[name].dtype == torch.bfloat16 and torch.equal(held[name], tensor.bfloat16())
    with pytest.raises(ConfigError, match="differ in"):
        copy_weights(source, build_gpt_model(tiny(vocab_size=48)))
