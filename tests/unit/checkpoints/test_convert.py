from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import dist_checkpointing
from safetensors.torch import load_file

from megatron_multiverse.checkpoints.convert import ConvertResult, convert_checkpoint
from megatron_multiverse.checkpoints.convert_config import ConvertConfig
from megatron_multiverse.checkpoints.names.registry import FAMILIES
from megatron_multiverse.checkpoints.run_files import POINTER_FILE, RECORD_FILE, STEP_FILE, why_outdated
from megatron_multiverse.checkpoints.verify import VerifyOptions
from megatron_multiverse.errors import ConfigError
from megatron_multiverse.model.cpu import device_neutral_cuda
from megatron_multiverse.model.gpt import build_gpt_model
from megatron_multiverse.model.weights import weight_state
from tests.unit.checkpoints.hf_folders import mcore_tensors
from tests.unit.checkpoints.test_names import shape
from tests.unit.model.hf import hf_model


def hf_folder(folder: Path, name: str = "qwen2", tied: bool = False, **changes: object) -> Path:
    family = FAMILIES[name]
    config = shape(tied, add_qkv_bias=family.add_qkv_bias, qk_layernorm=family.qk_layernorm, **changes)
    torch.manual_seed(0)
    hf_model(family.model_type, config).save_pretrained(folder, max_shard_size="20KB")
    return folder


def run(load: Path, save: Path, from_: str = "hf", to: str = "mcore", **options: object) -> ConvertResult:
    return convert_checkpoint(ConvertConfig(from_=from_, to=to, load=str(load), save=str(save), **options))


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


def assert_same(a: Path, b: Path) -> None:
    first, second = tensors(a), tensors(b)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


@pytest.mark.parametrize(
    "mcore_format", [{}, {"ckpt_format": "torch"}, {"ckpt_format": "torch", "transformer_impl": "local"}]
)
@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (3, 1), (1, 2), (3, 2)])
@pytest.mark.parametrize(("name", "tied"), [("qwen2", False), ("qwen3", True), ("llama", True)])
def test_round_trips_are_bit_equal(
    tmp_path: Path, name: str, tied: bool, tp: int, pp: int, mcore_format: dict[str, str]
) -> None:
    source = hf_folder(tmp_path / "hf", name, tied)
    sizes = {"tensor_model_parallel_size": tp, "pipeline_model_parallel_size": pp}
    run(source, tmp_path / "mcore", **sizes, **mcore_format)
    run(tmp_path / "mcore", tmp_path / "back", "mcore", "hf", shard_size=20e-6)
    assert_same(source, tmp_path / "back")
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (source, tmp_path / "back"))
    assert after == before | {"rope_theta": 1e6, "rope_scaling": None}  # transformers 4 does not read rope_parameters


def test_megatron_core_formats_convert_into_each_other(tmp_path: Path) -> None:
    source = hf_folder(tmp_path / "hf", "qwen3", True)
    run(source, tmp_path / "a", tensor_model_parallel_size=3, shard_size=20e-6)
    legacy = {"ckpt_format": "torch", "pipeline_model_parallel_size": 2}
    run(tmp_path / "a", tmp_path / "b", "mcore", "mcore", **legacy)
    run(tmp_path / "b", tmp_path / "c", "mcore", "mcore", tensor_model_parallel_size=3, make_vocab_size_divisible_by=7)
    run(tmp_path / "c", tmp_path / "back", "mcore", "hf")
    assert_same(source, tmp_path / "back")


@pytest.mark.parametrize("place", [".", "inner/.."])
def test_the_step_is_known_inside_of_the_folder_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    source = hf_folder(tmp_path / "iter_0000007")
    (source / "inner").mkdir()
    monkeypatch.chdir(source)
    run(Path(place), tmp_path / "out")
    assert json.loads((tmp_path / "out" / RECORD_FILE).read_text())["training_step"] == 7
    model = tmp_path / "run" / "model"
    (model / "inner").mkdir(parents=True)
    (model / STEP_FILE).write_text("3\n")
    (model.parent / POINTER_FILE).write_text("5\n")
    monkeypatch.chdir(model)
    assert why_outdated(Path(place)) == why_outdated(model)
    assert str(why_outdated(model)).startswith(f"{model} holds the weights of step 3")


def test_megatron_core_itself_opens_the_result(tmp_path: Path) -> None:
    source = hf_folder(tmp_path / "hf", "qwen3", False)
    run(source, tmp_path / "mcore", tensor_model_parallel_size=3, shard_size=20e-6)
    config = shape(False, qk_layernorm=True)
    model = build_gpt_model(config, seed=1)
    with device_neutral_cuda():
        loaded = dist_checkpointing.load(
            {"model": model.sharded_state_dict(metadata={})},
            str(tmp_path / "mcore/release"),
            strict=dist_checkpointing.validation.StrictHandling.RAISE_UNEXPECTED,
        )
    assert loaded["args"].padded_vocab_size == 51
    model.load_state_dict(loaded["model"])
    expected = mcore_tensors(source)
    for name, tensor in weight_state(model).items():
        assert torch.equal(tensor, expected[name]), name
    assert os.path.exists(tmp_path / "mcore/latest_checkpointed_iteration.txt")


def test_flags_are_named_as_megatron_names_them() -> None:
    from megatron_multiverse.cli import parse_options

    words = (
        "--from mcore --to=mcore --load a --save b --tensor-model-parallel-size 8 --add-control-tokens --trust_pickle"
    )
    config = parse_options(ConvertConfig, words.split())
    assert (config.from_, config.to, config.tensor_model_parallel_size) == ("mcore", "mcore", 8)
    assert config.add_control_tokens and config.trust_pickle
    assert parse_options(ConvertConfig, ["--from=mcore", "--to", "hf", "--load", "a", "--save", "b"]).from_ == "mcore"


QWEN25 = {
    "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_act": "silu", "hidden_size": 3584,
    "intermediate_size": 18944, "max_position_embeddings": 32768, "max_window_layers": 28, "num_attention_heads": 28,
    "num_hidden_layers": 28, "num_key_value_heads": 4, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0,
    "sliding_window": 131072, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_sliding_window": False,
    "vocab_size": 152064, "attention_dropout": 0.0,
}  # fmt: skip
LLAMA31 = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "attention_bias": False, "hidden_act": "silu",
    "hidden_size": 4096, "intermediate_size": 14336, "max_position_embeddings": 131072, "mlp_bias": False,
    "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8, "pretraining_tp": 1,
    "rms_norm_eps": 1e-05, "rope_theta": 500000.0, "tie_word_embeddings": False, "vocab_size": 128256,
    "rope_scaling": {
        "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
}  # fmt: skip


@pytest.mark.parametrize(("values", "parameters"), [(QWEN25, 7_615_616_512), (LLAMA31, 8_030_261_248)])
def test_published_configs_are_understood_and_written_back(values: dict[str, object], parameters: int) -> None:
    from megatron_multiverse.checkpoints.formats.hf_config import (
        family_of,
        hf_config_to_model_config,
        model_config_to_hf,
    )

    config = hf_config_to_model_config(values)
    assert config.num_parameters == parameters
    assert hf_config_to_model_config(model_config_to_hf(config, family_of(values))) == config


def test_a_conversion_starts_without_megatron_core_and_transformers() -> None:
    """Importing them takes longer than converting a small model."""
    code = (
        "import sys, megatron_multiverse.checkpoints.convert; print({'megatron.core', 'transformers'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize(
    ("kinds", "options", "named"),
    [
        (("hf", "hf"), {"tensor_model_parallel_size": 2}, "--tensor-model-parallel-size 2 has no effect with --to hf"),
        (("mcore", "hf"), {"make_vocab_size_divisible_by": 8}, "--make-vocab-size-divisible-by 8 has no effect"),
        (("mcore", "hf"), {"ckpt_format": "torch"}, "--ckpt-format torch has no effect with --to hf"),
        (("hf", "mcore"), {"transformer_impl": "local"}, "--transformer-impl local has no effect but with --to mcore"),
        (("hf", "mcore"), {"ckpt_format": "torch", "shard_size": 1.0}, "--shard-size 1.0 has no effect"),
        (("hf", "mcore"), {"tag_rows": "keep"}, "--tag-rows keep has no effect without --add-control-tokens"),
        (("hf", "mcore"), {"trust_pickle": True}, "--trust-pickle True has no effect with --from hf"),
    ],
)
def test_options_that_would_do_nothing_are_refused(kinds: tuple[str, str], options: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        ConvertConfig(from_=kinds[0], to=kinds[1], load="a", save="b", **options)


def test_one_spelling_of_dtypes() -> None:
    with pytest.raises(ConfigError, match="dtype is 'bfloat16', allowed: keep, float32, bf16, float16"):
        ConvertConfig(from_="hf", to="mcore", load="a", save="b", dtype="bfloat16")
    with pytest.raises(ConfigError, match="dtype is 'bfloat16', allowed: keep, float32, bf16, float16"):
        VerifyOptions(first=Path("a"), second=Path("b"), dtype="bfloat16")
