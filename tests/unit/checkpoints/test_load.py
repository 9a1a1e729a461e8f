"""A checkpoint loaded on several ranks: each holds its part, and the config is that of the whole model."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from megatron_multiverse.checkpoints.convert import convert_checkpoint
from megatron_multiverse.checkpoints.convert_config import ConvertConfig
from megatron_multiverse.checkpoints.load import load_checkpoint, model_from_source
from megatron_multiverse.checkpoints.reference_logits import pipeline_logits
from megatron_multiverse.checkpoints.sources import loadable, open_checkpoint
from megatron_multiverse.config import ModelConfig
from megatron_multiverse.errors import CheckpointError, ConfigError, RankError
from megatron_multiverse.model.attention import LayoutParams
from megatron_multiverse.model.families import qwen2
from megatron_multiverse.model.gpt import build_gpt_model
from megatron_multiverse.model.mcore import set_parallel_sizes
from megatron_multiverse.model.weights import save_model, weight_state
from megatron_multiverse.parallel.local_ranks import run_ranks
from tests.unit.checkpoints.hf_folders import mcore_tensors, save_hf_model


def loaded_part(folder: Path, tp: int, pp: int) -> tuple[ModelConfig, dict[str, torch.Tensor]]:
    set_parallel_sizes(tp, pp)
    model, config = load_checkpoint(folder)
    return config, weight_state(model)


@pytest.mark.parametrize("tied", [True, False])
def test_the_config_fits_the_padded_weights_of_all_tensor_ranks(tmp_path: Path, tied: bool) -> None:
    """321 rows on two ranks: 161 each, the last row of the second is padding."""
    save_hf_model(tmp_path, "qwen2", vocab_size=321, tie_word_embeddings=tied)
    (config, first), (other, second) = run_ranks(loaded_part, 2, tmp_path, 2, 1)
    assert config == other and config.vocab_size == 322
    for name in ("embedding.word_embeddings.weight", *(["output_layer.weight"] if not tied else [])):
        whole = torch.cat([first[name], second[name]])
        assert whole.shape == (config.vocab_size, config.hidden_size)
        assert torch.equal(whole[:321], mcore_tensors(tmp_path)[name]) and not whole[321].any()


def test_each_pipeline_stage_holds_its_own_layers(tmp_path: Path) -> None:
    save_hf_model(tmp_path, "qwen2", num_hidden_layers=4)
    parts = run_ranks(loaded_part, 2, tmp_path, 1, 2)
    whole = mcore_tensors(tmp_path)
    for stage, (config, weights) in enumerate(parts):
        assert config.num_layers == 4
        for layer in (0, 1):
            name = "decoder.layers.{}.mlp.linear_fc1.weight"
            assert torch.equal(weights[name.format(layer)], whole[name.format(2 * stage + layer)])
        assert "decoder.layers.2.mlp.linear_fc1.weight" not in weights


def logits_of_two_stages() -> list[torch.Tensor | None]:
    """Two pipeline stages, tied: the second keeps a copy of the embedding of the first."""
    config = qwen2(
        num_layers=2, hidden_size=16, ffn_hidden_size=24, num_attention_heads=2, vocab_size=32, max_sequence_length=32
    )
    set_parallel_sizes(1, 2)
    model = build_gpt_model(config, seed=3)
    ids = torch.arange(12).view(2, 6)
    return [pipeline_logits(model, ids, ids % 6, LayoutParams.causal(ids)), *weight_state(model).values()]


def test_the_last_stage_returns_the_logits() -> None:
    (first, *_), (last, *_) = run_ranks(logits_of_two_stages, 2)
    assert first is None and last.shape == (2, 6, 32) and torch.isfinite(last).all()


def test_a_folder_of_another_kind_is_named(tmp_path: Path) -> None:
    save_hf_model(tmp_path / "hf", "qwen2")
    model, config = load_checkpoint(tmp_path / "hf")
    save_model(model, config, tmp_path / "ours")
    assert open_checkpoint(tmp_path / "ours", side="mcore").config == config
    with pytest.raises(CheckpointError, match="holds a Hugging Face model, which is --from hf; --from says mcore"):
        open_checkpoint(tmp_path / "hf", side="mcore")
    with pytest.raises(CheckpointError, match="holds a megatron-core checkpoint or a model folder"):
        open_checkpoint(tmp_path / "ours", side="hf")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"is no checkpoint: it has neither config\.json"):
        open_checkpoint(tmp_path / "empty")
    with pytest.raises(CheckpointError, match="is no folder"):
        open_checkpoint(tmp_path / "missing")


def test_what_a_tool_loads_is_a_checkpoint_or_the_one_in_force(tmp_path: Path) -> None:
    save_hf_model(tmp_path / "hf", "qwen2")
    assert loadable(tmp_path / "hf") == tmp_path / "hf"
    run = tmp_path / "run"
    (run / "iter_0000012").mkdir(parents=True)
    (run / "latest_checkpointed_iteration.txt").write_text("12")
    assert loadable(run) == run, "a converted one may have no tokenizer anywhere"
    (run / "iter_0000012" / "tokenizer.json").write_text("{}")
    assert loadable(run) == run / "iter_0000012", "where the trainer puts the tokenizer"
    (run / "tokenizer.json").write_text("{}")
    assert loadable(run) == run, "where the converter puts it"


def test_a_folder_that_cannot_be_loaded_says_what_to_give(tmp_path: Path) -> None:
    save_hf_model(tmp_path / "hf", "qwen2")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match=rf"^--load: {tmp_path} is no checkpoint: .*; {tmp_path / 'hf'} is one$"):
        loadable(tmp_path)
    with pytest.raises(CheckpointError, match=rf"config\.json is no folder; .*: {tmp_path / 'hf'} is one$"):
        loadable(tmp_path / "hf" / "config.json")
    with pytest.raises(CheckpointError, match=r"^--load Qwen/Qwen3-8B: no such folder; .* hf download OWNER/NAME"):
        loadable(Path("Qwen/Qwen3-8B"))
    with pytest.raises(CheckpointError, match=r"^Qwen/Qwen3-8B is no folder; .* hf download OWNER/NAME"):
        open_checkpoint("Qwen/Qwen3-8B")


@pytest.mark.parametrize("name", ["model_config", "vocab_size"])
def test_options_for_megatrons_formats_are_refused_for_others(tmp_path: Path, name: str) -> None:
    save_hf_model(tmp_path / "hf", "qwen2")
    model, config = load_checkpoint(tmp_path / "hf")
    save_model(model, config, tmp_path / "ours")
    value = {"model_config": str(tmp_path / "hf"), "vocab_size": 100}[name]
    for folder in ("hf", "ours"):
        with pytest.raises(ConfigError, match=f"--{name.replace('_', '-')} {value} is for Megatron's formats"):
            open_checkpoint(tmp_path / folder, **{name: value})


def test_a_run_without_pointer(tmp_path: Path) -> None:
    """A finished run may have its final weights alone; with checkpoints nobody can tell which is in force."""
    save_hf_model(tmp_path / "hf", "qwen2")
    model, config = load_checkpoint(tmp_path / "hf")
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text('{"train_iters": 1}')
    with pytest.raises(CheckpointError, match="describes no model"):
        open_checkpoint(run)
    save_model(model, config, run / "model")
    assert open_checkpoint(run).config == config and open_checkpoint(run).folder == run / "model"
    for step in ("iter_0000002", "iter_0000010", "iter_0000012.partial"):
        (run / step).mkdir()
    with pytest.raises(CheckpointError, match=r"no latest_checkpointed_iteration.txt.*the newest is .*iter_0000010$"):
        open_checkpoint(run)


def test_the_shape_inside_a_checkpoint_comes_before_the_one_beside_it(tmp_path: Path) -> None:
    """A run that trains on in the folder of a conversion leaves the conversion's record beside its checkpoints."""
    save_hf_model(tmp_path / "hf", "qwen2")
    convert_checkpoint(ConvertConfig(from_="hf", to="mcore", load=str(tmp_path / "hf"), save=str(tmp_path / "run")))
    before = open_checkpoint(tmp_path / "run").config
    own = dataclasses.replace(before, rotary_base=7e5)
    own.to_json(tmp_path / "run/release/model_config.json")
    assert open_checkpoint(tmp_path / "run").config == own


def test_a_part_of_a_model_is_not_saved_as_a_whole(tmp_path: Path) -> None:
    save_hf_model(tmp_path / "hf", "qwen2")
    for tp, pp in ((2, 1), (1, 2)):
        with pytest.raises(RankError, match=f"spread over {tp} tensor x {pp} pipeline parallel ranks"):
            run_ranks(saved_part, 2, tmp_path / "hf", tmp_path / "out", tp, pp)
    assert not (tmp_path / "out").exists()


def saved_part(load: Path, save: Path, tp: int, pp: int) -> None:
    set_parallel_sizes(tp, pp)
    save_model(*load_checkpoint(load), save)


def test_a_cut_that_does_not_fit_is_refused_by_every_rank(tmp_path: Path) -> None:
    save_hf_model(tmp_path, "qwen2", num_attention_heads=3, num_key_value_heads=3, hidden_size=48)
    with pytest.raises(RankError, match=r"ConfigError: num_attention_heads \(3\) is not divisible"):
        run_ranks(loaded_part, 2, tmp_path, 2, 1)


def test_a_run_folder_is_a_megatron_checkpoint(tmp_path: Path) -> None:
    """The trainer keeps its own config.json there, which describes no model."""
    save_hf_model(tmp_path / "hf", "qwen2")
    convert_checkpoint(ConvertConfig(from_="hf", to="mcore", load=str(tmp_path / "hf"), save=str(tmp_path / "run")))
    (tmp_path / "run" / "config.json").write_text('{"train_iters": 1}')
    assert open_checkpoint(tmp_path / "run").config == open_checkpoint(tmp_path / "hf").config


@pytest.mark.parametrize("tied", [True, False])
def test_weights_made_on_the_device_are_those_copied_there(tmp_path: Path, tied: bool) -> None:
    save_hf_model(tmp_path, "qwen2", tie_word_embeddings=tied)
    source = open_checkpoint(tmp_path)
    copied, made = (weight_state(model_from_source(source, on_device=on)[0]) for on in (False, True))
    assert copied.keys() == made.keys() and all(torch.equal(copied[name], made[name]) for name in copied)
