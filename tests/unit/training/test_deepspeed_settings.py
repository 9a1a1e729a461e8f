"""Our config in DeepSpeed's words, a user's own JSON beside it, and what is refused before anything starts."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from megatron_multiverse.config import TrainConfig
from megatron_multiverse.errors import ConfigError
from megatron_multiverse.training.deepspeed_settings import check_deepspeed, deepspeed_config
from megatron_multiverse.training.start import describe_model

from .synthetic import config


@pytest.fixture(autouse=True)
def eight_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "8")


def run_of(folder: Path, **changes: Any) -> TrainConfig:
    return config(folder, **{"engine": "deepspeed", "data.global_batch_size": 32, "dtype": "bf16", **changes})


def with_json(folder: Path, content: str, **changes: Any) -> TrainConfig:
    (folder / "own.json").write_text(content)
    return run_of(folder, **{"deepspeed.config": str(folder / "own.json"), **changes})


def test_our_settings_are_translated(tmp_path: Path) -> None:
    found = deepspeed_config(run_of(tmp_path, **{"deepspeed.offload_optimizer": "cpu"}), on_gpu=True)
    assert found["train_micro_batch_size_per_gpu"] * found["gradient_accumulation_steps"] * 8 == 32
    assert found["bf16"] == {"enabled": True} and found["gradient_clipping"] == 1.0
    zero = found["zero_optimization"]
    assert zero["stage"] == 3 and zero["offload_optimizer"] == {"device": "cpu", "pin_memory": True}
    assert zero["offload_param"] == {"device": "none"}
    assert "optimizer" not in found and "scheduler" not in found  # ours


def test_a_json_of_ones_own_may_add_and_agree(tmp_path: Path) -> None:
    own = {
        "train_batch_size": 32,
        "gradient_accumulation_steps": "auto",
        "bf16": {"enabled": "auto"},
        "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": [0.9, 0.95]}},
        "zero_optimization": {"stage": 3, "overlap_comm": False, "offload_optimizer": {"buffer_count": 8}},
        "communication_data_type": "bf16",
    }
    run = with_json(tmp_path, json.dumps(own))
    found, without = deepspeed_config(run), deepspeed_config(run_of(tmp_path))
    assert found["zero_optimization"].pop("overlap_comm") is False
    assert found["zero_optimization"]["offload_optimizer"].pop("buffer_count") == 8
    assert (found.pop("communication_data_type"), without.pop("communication_data_type")) == ("bf16", "fp32")
    assert found == without


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"zero_optimization": {"stage": 2}}', "zero_optimization.stage is 2, but the training config makes it 3"),
        ('{"train_batch_size": 31}', "train_batch_size is 31, but the training config makes it 32"),
        ('{"optimizer": {"params": {"lr": 1}}}', r"optimizer.params.lr is 1, but the training config makes it"),
        ('{"fp16": {"enabled": true}}', "fp16.enabled is True"),
        (
            '{"zero_optimisation": {}, "wall_clock_breakdwon": true}',
            "wall_clock_breakdwon is not taken from it; allowed",
        ),
        ('{"scheduler": {"type": "WarmupLR"}}', "scheduler.type is not taken from it"),
        ('{"zero_optimization": true}', "zero_optimization is True, where the training config has"),
        ('{"zero_optimization": {"offload_param": null}}', "offload_param is None, where the training config has"),
        ('{"zero_optimization": {"stage": {"x": 1}}}', "zero_optimization.stage.x is 1, where the training config has"),
        ('{"zero_optimization": {"cpu_offload": true}}', "the training config has deepspeed.offload_optimizer"),
        ("{", "cannot be read as JSON"),
        ("[]", "holds list, not an object"),
    ],
)
def test_what_contradicts_or_is_unknown_is_named(content: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        describe_model(with_json(tmp_path, content))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"parallel.pipeline_model_parallel_size": 2}, "pipeline_model_parallel_size 2 does not go with engine"),
        (
            {"parallel.tensor_model_parallel_size": 2, "parallel.sequence_parallel": True},
            "sequence_parallel does not go with engine deepspeed",
        ),
        ({"parallel.tensor_model_parallel_size": 8}, "all 8 ranks .WORLD_SIZE. are tensor parallel"),
        ({"layers.fp8": "hybrid", "data.seq_length": 64}, "layers.fp8 hybrid does not go with engine deepspeed"),
        ({"dtype": "float64"}, "float64 is for engine one_process on one rank; deepspeed takes float32 and bf16"),
        ({"deepspeed.zero_stage": 0}, "zero_stage"),
        ({"deepspeed.zero_stage": 2, "deepspeed.offload_param": "cpu"}, "offload_param cpu needs .* stage"),
        ({"engine": "megatron", "deepspeed.zero_stage": 1}, "no effect with engine megatron"),
    ],
)
def test_what_zero_cannot_do_is_refused_with_the_reason(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        run_of(tmp_path, **changes)


def test_a_missing_package_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs the package deepspeed.*'\.\[deepspeed\]'"):
        check_deepspeed(run_of(tmp_path))
