from __future__ import annotations

import dataclasses
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_multiverse.cli import parse_options
from megatron_multiverse.config import ModelConfig, ParallelConfig, RLConfig, TrainConfig, pad_vocab_size
from megatron_multiverse.errors import ConfigError

MODEL = {
    "num_layers": 2, "hidden_size": 64, "ffn_hidden_size": 128, "num_attention_heads": 4, "num_query_groups": 2,
    "kv_channels": 16, "vocab_size": 320, "max_sequence_length": 512,
}  # fmt: skip


def values(**changes: Any) -> dict[str, Any]:
    base: dict[str, Any] = {
        "model": dict(MODEL),
        "data": {"data_prefixes": ["a"], "seq_length": 256, "micro_batch_size": 2, "global_batch_size": 8},
        "checkpoint": {"save": "runs/x"},
    }
    for dotted, value in changes.items():
        *parents, last = dotted.split(".")
        node = base
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    return base


def test_vocabularies_are_padded_as_megatron_does() -> None:
    assert [pad_vocab_size(size, 128) for size in (1, 128, 129)] == [128, 128, 256]
    assert pad_vocab_size(151677, 128 * 8) == 152576
    assert pad_vocab_size(296, 64) == 320


def test_round_trip_through_plain_values_and_json(tmp_path: Path) -> None:
    config = TrainConfig.from_dict(values(**{"optim.lr": 3e-4}))
    assert TrainConfig.from_dict(config.to_dict()) == config
    assert config.num_microbatches == 4
    config.model.to_json(tmp_path / "config.json")
    assert ModelConfig.from_json(tmp_path / "config.json") == config.model


@pytest.mark.parametrize(
    ("dotted", "value", "message"),
    [
        ("optim.learning_rate", 1.0, r"optim\.learning_rate: unknown key"),
        ("optim.warmup_iters", 1, r"did you mean 'lr_warmup_iters'"),
        ("data.global_batch_size", 9, r"global_batch_size \(9\) must be divisible by data.micro_batch_size \(2\)"),
        ("data.seq_length", 1024, r"seq_length \(1024\) must not exceed the model's max_sequence_length \(512\)"),
        ("data.seq_length", "long", r"config\.data\.seq_length: expected int, got 'long'"),
        ("data.num_workers", True, r"expected int, got True"),
        ("data.data_prefixes", [], r"data_prefixes is empty"),
        ("data.overlong", "cut", r"'cut', allowed: drop, refuse"),
        ("data.malformed", "skip", r"'skip', allowed: refuse, drop, causal"),
        ("layers.attention_backend", "flesh", "'flesh', allowed: auto, flash4, flex, dense"),
        ("layers.fp8", "hybrid", r"layers.fp8 needs dtype bf16 and a multiple of 16 tokens .* got dtype float32"),
        ("layers", {"recompute": "full"}, r"config\.layers\.recompute: unknown key"),
        ("optim.min_lr", 1.0, r"min_lr \(1\.0\) must lie in"),
        ("optim.lr_decay_style", "step", r"'step', allowed: cosine, wsd, constant"),
        ("optim.lr_warmup_iters", 1000, r"must be below train_iters \(1000\)"),
        ("optim", {"lr_warmup_iters": 5, "lr_decay_iters": 5}, r"must be below optim\.lr_decay_iters \(5\)"),
        (
            "optim",
            {"lr_decay_style": "wsd", "lr_wsd_decay_iters": 2000},
            r"\(0\) and the 2000 steps .* \(1000\) together",
        ),
        ("optim", {"lr_decay_style": "wsd", "lr_warmup_iters": 950}, r"\(950\) and the 100 steps .* \(1000\) together"),
        ("optim.lr_decay_iters", -1, r"lr_decay_iters must not be negative"),
        ("model.num_query_groups", 3, r"num_attention_heads \(4\) must be divisible"),
        ("model.kv_channels", 15, r"must be even"),
        ("model.hidden_size", 0, r"model.hidden_size must be at least 1, got 0"),
        ("init_from", "folder", r"exactly one of `model`.*, got model and init_from: .*, or pass --model null$"),
        ("model", None, r"exactly one of `model`.*, got none$"),
        ("parallel.tensor_model_parallel_size", 2, r"1 ranks \(WORLD_SIZE\) cannot be divided into groups of 2"),
        (
            "parallel.virtual_pipeline_model_parallel_size",
            2,
            r"has no effect without .*pipeline_model",
        ),
        ("parallel.cp_comm_type", "ring", r"'ring', allowed: all_gather, a2a"),
        ("parallel.cp_comm_type", "a2a", r"a2a has no effect without parallel.context_parallel_size above 1"),
        ("engine", "zero", r"'zero', allowed: auto, one_process, megatron"),
        ("parallel.context_parallel_size", 0, r"context_parallel_size must be at least 1, got 0"),
        ("parallel.sequence_parallel", True, r"sequence_parallel has no effect without .* set both or neither"),
        ("parallel.data_parallel_size", 2, r"parallel\.data_parallel_size: unknown key"),
        ("dtype", "fp8", r"'fp8', allowed: float32, bf16, float64"),
        ("checkpoint.save", "", r"checkpoint.save is empty"),
        ("optim.lr", math.inf, r"optim\.lr must be finite, got inf"),
        ("optim.clip_grad", math.nan, r"optim\.clip_grad must be finite, got nan"),
        ("optim.adam_eps", -1e-8, r"optim\.adam_eps must not be negative"),
        ("log.peak_tflops", math.inf, r"log\.peak_tflops must be finite"),
        ("model.rotary_base", math.inf, r"model\.rotary_base must be finite"),
    ],
)
def test_wrong_values_are_named(dotted: str, value: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TrainConfig.from_dict(values(**{dotted: value}))


@pytest.mark.parametrize(
    ("world", "changes", "message"),
    [
        (8, {"engine": "one_process"}, r"one_process runs on one rank, but WORLD_SIZE is 8"),
        (8, {"dtype": "float64"}, r"float64 is for engine one_process"),
        (8, {"parallel.tensor_model_parallel_size": 3}, r"8 ranks .* groups of 3"),
        (
            4,
            {"data.global_batch_size": 6},
            r"\(6\) must be divisible by .* \(2\) x data parallel size \(4\): .*multiple of 8",
        ),
        (3, {"parallel.context_parallel_size": 3}, r"seq_length \(256\) must be a multiple of 48"),
        (
            2,
            {
                "parallel.pipeline_model_parallel_size": 2,
                "parallel.virtual_pipeline_model_parallel_size": 2,
                "data.global_batch_size": 2,
            },
            r"multiple of parallel.pipeline_model_parallel_size \(2\) microbatches, got 1",
        ),
    ],
)
def test_what_cannot_be_spread_over_the_ranks_is_named(
    world: int, changes: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", str(world))
    with pytest.raises(ConfigError, match=message):
        TrainConfig.from_dict(values(**changes))


@pytest.mark.parametrize(
    ("sizes", "ffn", "message"),
    [
        ({"tensor_model_parallel_size": 8}, 128, r"num_attention_heads \(4\): this model takes 1, 2 or 4$"),
        ({"tensor_model_parallel_size": 4}, 6, r"must divide the model's ffn_hidden_size \(6\): .* takes 1 or 2$"),
        ({"pipeline_model_parallel_size": 8}, 128, r"\(8 x 1\) must divide .*num_layers \(2\): .* can be 1 or 2$"),
        ({"context_parallel_size": 8, "cp_comm_type": "a2a"}, 128, r"\(8\) that divides .* \(2 of 2"),
    ],
)
def test_models_that_cannot_be_cut_are_refused(
    sizes: dict[str, Any], ffn: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "8")
    model = ModelConfig(**{**MODEL, "ffn_hidden_size": ffn})
    with pytest.raises(ConfigError, match=message):
        ParallelConfig(**sizes).check_model(model)


def test_missing_keys_are_named() -> None:
    given = values()
    del given["model"]["num_layers"]
    with pytest.raises(ConfigError, match=r"config\.model\.num_layers: required and missing"):
        TrainConfig.from_dict(given)


def test_yaml_with_overrides_is_what_the_mapping_says(tmp_path: Path) -> None:
    """Numbers too that YAML 1.1 takes for text."""
    file = tmp_path / "run.yaml"
    lines = ["model:", *(f"  {k}: {v}" for k, v in MODEL.items())]
    lines += ["data: {data_prefixes: [a, b], seq_length: 256}", "checkpoint: {save: runs/x}", "optim: {lr: 1e-3}"]
    file.write_text("\n".join(lines))
    overrides = {"data.seq_length": 128, "model.num_layers": 3, "dtype": "bf16"}
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in overrides.items()]
    read = parse_options(TrainConfig, ["--config", str(file), *flags])
    data = {"data_prefixes": ["a", "b"], "seq_length": 256}
    assert read == TrainConfig.from_dict(values(data=data, **overrides, **{"optim.lr": 1e-3}))
    assert read.optim.lr == 1e-3 and read.data.data_prefixes == ("a", "b") and read.model.num_layers == 3
    with pytest.raises(ConfigError, match=r"unknown flag --optim\.learning-rate"):
        parse_options(TrainConfig, ["--config", str(file), "--optim.learning-rate=1"])
    for wrong in (["--checkpoint.save.x=1"], ["--config", str(tmp_path / "none.yaml")]):
        with pytest.raises(SystemExit):
            parse_options(TrainConfig, ["--config", str(file), *wrong])


def test_mistakes_in_a_yaml_file_are_told_in_our_words(tmp_path: Path) -> None:
    """Also those in optional parts, of which jsonargparse would say that they fit no member of a union."""
    file = tmp_path / "run.yaml"
    shape = ", ".join(f"{name}: {value}" for name, value in MODEL.items())
    text = f"model: {{{shape}}}\ndata: {{data_prefixes: [a], seq_length: 256}}\ncheckpoint: {{save: runs/x}}\n"
    file.write_text(text.replace("num_query_groups: 2", "num_query_groups: 3"))
    with pytest.raises(ConfigError, match=r"^model\.num_attention_heads \(4\) must be divisible by"):
        parse_options(TrainConfig, ["--config", str(file)])
    file.write_text(text + "optim:\n  lr: 1e-3\n  lr: 1e-4\n")
    for flags in (["--config", str(file)], [f"--config={file}"]):
        with pytest.raises(ConfigError, match=r"run\.yaml, line 6: 'lr' stands twice, first in line 5"):
            parse_options(TrainConfig, flags)
    file.write_text(text + "optim: {lr: .inf}\n")
    with pytest.raises(ConfigError, match=r"optim\.lr must be finite"):
        parse_options(TrainConfig, ["--config", str(file)])
    file.write_text(text)
    with pytest.raises(ConfigError, match="unknown flag --train-iter; did you mean --train-iters"):
        parse_options(TrainConfig, ["--config", str(file), "--train_iter", "3"])


def test_shipped_configs_are_valid(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each on the fewest ranks that hold its model."""
    files = sorted((Path(__file__).parents[2] / "pretrain_scripts" / "configs").glob("*.yaml"))
    assert files
    for file in files:
        sizes = yaml.safe_load(file.read_text(encoding="utf-8")).get("parallel", {})
        ranks = math.prod(
            size for name, size in sizes.items() if name.endswith("parallel_size") and "virtual" not in name
        )
        monkeypatch.setenv("WORLD_SIZE", str(ranks))
        kind = RLConfig if file.name.startswith("rl_") else TrainConfig
        assert parse_options(kind, ["--config", str(file)]).train_iters > 0


def test_configs_are_frozen_and_import_no_torch() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        TrainConfig.from_dict(values()).seed = 1  # type: ignore[misc]
    code = "import sys, megatron_multiverse.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
