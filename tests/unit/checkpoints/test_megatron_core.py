"""megatron-core's own loader opens what we write, at other tensor and pipeline sizes too; and we read what it saves."""

from __future__ import annotations

import dataclasses
import multiprocessing
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import dist_checkpointing, parallel_state

from megatron_multiverse.checkpoints.convert import open_source
from megatron_multiverse.checkpoints.convert_config import ConvertConfig
from megatron_multiverse.checkpoints.names.rules import slices
from megatron_multiverse.checkpoints.names.table import entries
from megatron_multiverse.config import ModelConfig
from megatron_multiverse.errors import CheckpointError
from megatron_multiverse.model.cpu import device_neutral_cuda
from megatron_multiverse.model.gpt import build_gpt_model
from megatron_multiverse.model.mcore import set_parallel_sizes
from megatron_multiverse.model.weights import weight_state
from megatron_multiverse.parallel.local_ranks import run_ranks
from tests.extra_states import assert_extra_states_load
from tests.unit.checkpoints.hf_folders import mcore_tensors
from tests.unit.checkpoints.test_convert import assert_same, hf_folder, run

GROUPS = {"num_attention_heads": 6, "num_query_groups": 2, "kv_channels": 6}


def loaded_by_megatron_core(folder: str, config: ModelConfig, tp: int, pp: int) -> dict[str, torch.Tensor]:
    """On one rank: the rank's weights, by global layer number, after dist_checkpointing.load."""
    set_parallel_sizes(tp, pp)
    model = build_gpt_model(config, seed=7)
    with device_neutral_cuda():
        loaded = dist_checkpointing.load({"model": model.sharded_state_dict(metadata={})}, folder)
    model.load_state_dict(loaded["model"])
    first = parallel_state.get_pipeline_model_parallel_rank() * config.num_layers // pp
    result = {}
    for name, tensor in weight_state(model).items():
        words = name.split(".")
        if name.startswith("decoder.layers."):
            words[2] = str(int(words[2]) + first)
        result[".".join(words)] = tensor.clone()
    return result


def saved_by_megatron_core(folder: str, config: ModelConfig, tp: int, pp: int, source: str) -> None:
    """On one rank: load `source` and let megatron-core save it, in its own cut."""
    multiprocessing.current_process()._config["daemon"] = False  # the writer starts processes
    set_parallel_sizes(tp, pp)
    model = build_gpt_model(config, seed=7)
    with device_neutral_cuda():
        state = model.sharded_state_dict(metadata={})
        model.load_state_dict(dist_checkpointing.load({"model": state}, source)["model"])
        dist_checkpointing.save({"model": model.sharded_state_dict(metadata={}), "iteration": 5}, folder)


@pytest.mark.parametrize(("name", "tied"), [("qwen2", False), ("qwen3", True)])
@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (1, 2), (2, 2)])
def test_megatron_core_loads_at_any_size(tmp_path: Path, name: str, tied: bool, tp: int, pp: int) -> None:
    source = hf_folder(tmp_path / "hf", name, tied, **GROUPS)
    run(source, tmp_path / "mcore", tensor_model_parallel_size=2, shard_size=20e-6)
    checkpoint = open_source(ConvertConfig(from_="hf", to="mcore", load=str(source), save="unused"))
    config, whole = checkpoint.config, mcore_tensors(source)
    release = str(tmp_path / "mcore" / "release")
    ranks = run_ranks(loaded_by_megatron_core, tp * pp, release, config, tp, pp)
    rules = {entry.mcore: entry.rule for entry in entries(checkpoint.family, config)}
    seen = set()
    for rank, state in enumerate(ranks):  # tensor ranks run fastest
        for key, tensor in state.items():
            tied_copy = key == "output_layer.weight" and key not in whole
            original = "embedding.word_embeddings.weight" if tied_copy else key
            expected = slices(rules[original], whole[original], tp)[rank % tp]
            assert torch.equal(tensor, expected), (rank, key)
            seen.add(original)
    assert seen == whole.keys()


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 2)])
def test_what_megatron_core_saves_is_read(tmp_path: Path, tp: int, pp: int) -> None:
    source = hf_folder(tmp_path / "hf", "qwen3", False, **GROUPS)
    run(source, tmp_path / "mcore")
    config = open_source(ConvertConfig(from_="hf", to="mcore", load=str(source), save="unused")).config
    saved = tmp_path / "saved" / "iter_0000005"
    saved.mkdir(parents=True)
    run_ranks(saved_by_megatron_core, tp * pp, str(saved), config, tp, pp, str(tmp_path / "mcore/release"))
    (saved.parent / "latest_checkpointed_iteration.txt").write_text("5\n")
    with pytest.raises(ValueError, match="--model-config"):
        run(saved.parent, tmp_path / "back", "mcore", "hf")
    run(saved.parent, tmp_path / "back", "mcore", "hf", model_config=str(source))
    assert_same(source, tmp_path / "back")
    wrong = tmp_path / "wrong.json"
    dataclasses.replace(config, ffn_hidden_size=50).to_json(wrong)
    with pytest.raises(CheckpointError, match=r"distcp: tensor .*linear_fc1.weight has shape \[96, 36\].*\[100, 36\]"):
        run(saved.parent, tmp_path / "out", "mcore", "hf", model_config=str(wrong))


@pytest.mark.parametrize("name", ["qwen2", "qwen3"])
def test_a_megatron_with_transformer_engine_finds_its_extra_states(tmp_path: Path, name: str) -> None:
    """Without them its own GPTModel could not be loaded; norms on queries and keys (Qwen3) have theirs too."""
    run(hf_folder(tmp_path / "hf", name, False), tmp_path / "mcore")
    modules = ["self_attention.linear_qkv", "self_attention.linear_proj", "self_attention.core_attention"]
    modules += ["mlp.linear_fc1", "mlp.linear_fc2"]
    modules += ["self_attention.q_layernorm", "self_attention.k_layernorm"] * (name == "qwen3")
    assert_extra_states_load(tmp_path / "mcore" / "release", modules, layers=2)


def test_extra_tensors_of_megatron_core_are_refused(tmp_path: Path) -> None:
    source = hf_folder(tmp_path / "hf", "qwen3", False)
    run(source, tmp_path / "mcore")
    values: dict[str, Any] = {"model_config": str(hf_folder(tmp_path / "other", "llama", False)), "family": "llama"}
    with pytest.raises(
        CheckpointError, match=r"__0_0.distcp: tensor \S+k_layernorm.weight is not part of a dense llama model"
    ):
        run(tmp_path / "mcore", tmp_path / "out", "mcore", "hf", **values)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("tied", [True, False])
def test_an_mp_rank_file_is_a_state_dict_of_the_model(tmp_path: Path, tied: bool) -> None:
    source = hf_folder(tmp_path / "hf", "qwen3", tied)
    run(source, tmp_path / "mcore", ckpt_format="torch", transformer_impl="local")
    content = torch.load(tmp_path / "mcore/release/mp_rank_00/model_optim_rng.pt", weights_only=True)
    config = open_source(ConvertConfig(from_="hf", to="mcore", load=str(source), save="unused")).config
    model = build_gpt_model(config, seed=7)
    model.load_state_dict(content["model"], strict=True)
    assert content["args"].num_layers == 2 and content["checkpoint_version"] == 3.0
    whole = mcore_tensors(source)
    for name, tensor in weight_state(model).items():
        assert torch.equal(tensor, whole[name]), name
