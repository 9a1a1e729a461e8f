"""The dry run: parts of the model are built without memory, and the arithmetic of a rank adds up."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
from torch import distributed

from benchmarks.training_layouts import Options, layouts, run_config, shape_of
from megatron_multiverse.cli import parse_options
from megatron_multiverse.config import LayerConfig, TrainConfig
from megatron_multiverse.errors import ConfigError
from megatron_multiverse.model.families import preset
from megatron_multiverse.training.memory import (
    CARDS,
    GIB,
    NOT_COUNTED_GIB,
    StateBytes,
    estimate,
    gathered,
    kept_per_token,
    layers_in_flight,
    least_recompute,
    logits_of,
    state_bytes,
)
from megatron_multiverse.training.memory_report import shape_to_try
from tests.forked import run_forked

from .synthetic import config

AFTER_OTHERS = ("ZeRO-3 CP2",)
"""DeepSpeed leaves the state of the ZeRO layout that was measured before in the same process."""
ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def no_process_group() -> None:
    """An estimate pretends to be one of many ranks; models of other tests leave a group of one rank in this process."""
    if distributed.is_initialized():
        distributed.destroy_process_group()


def dry_run(world: int, name: str, shape: str | None = "qwen2.5-32b") -> subprocess.CompletedProcess[str]:
    script, file = ROOT / "pretrain_scripts/sft_multiverse.py", ROOT / f"pretrain_scripts/configs/{name}.yaml"
    options = ["--config", file, "--dry-run", *(["--dry-run-shape", shape] if shape else [])]
    return run_forked(script, *options, env=os.environ | {"WORLD_SIZE": str(world)})


def test_the_dry_run_of_a_real_config_needs_no_gpu() -> None:
    done = dry_run(16, "qwen2.5_32b_tp8_pp2")
    assert done.returncode == 0 and "transformer layers" not in done.stderr, done.stderr
    parameters = [float(number) for number in re.findall(r"([\d.]+) billion parameters on each rank", done.stdout)]
    # Two stages of 8 tensor parallel ranks; the norms and nothing else are on all of these.
    assert 8 * sum(parameters) == pytest.approx(32.76, rel=1e-3)
    together = [float(number) for number in re.findall(r"together +([\d.]+) GiB", done.stdout)]
    assert len(together) == 2 and all(25 < number < 75 for number in together)
    assert re.search("on GPUs of 80 GB: fits with the first .* of 32 layers recomputed", done.stdout), done.stdout
    zero = dry_run(8, "qwen2.5_32b_zero3")
    assert zero.returncode == 0, zero.stderr
    (together, on_the_host) = re.findall(r"(?:together|on the host) +([\d.]+) GiB", zero.stdout)
    assert 7.6 < float(together) < 75 and float(on_the_host) == pytest.approx(32.764e9 * 16 / 8 / 2**30, rel=1e-3)
    refused = dry_run(8, "qwen2.5_32b_tp8_pp2")
    assert refused.returncode == 1 and "8 ranks (WORLD_SIZE) cannot be divided into groups of 16" in refused.stderr
    assert "WORLD_SIZE=16 in its environment" in refused.stderr
    absent = dry_run(4, "qwen2.5_7b_tp4", shape=None)  # the checkpoint is not here
    assert absent.returncode == 1 and "or name its published shape, as in --dry-run-shape qwen2.5-7b" in absent.stderr


def test_rows_longer_than_a_published_shape_end_the_dry_run_as_they_end_the_run(tmp_path: Path) -> None:
    long = config(tmp_path, **{"data.seq_length": 65536, "model": None, "init_from": "absent"})
    with pytest.raises(ConfigError, match=r"^data\.seq_length \(65536\) must not exceed .* \(32768\)$"):
        shape_to_try(long, "qwen2.5-7b")
    with pytest.raises(ConfigError, match=r"^policy\.seq_length \(65536\)"):
        shape_to_try(long, "qwen2.5-7b", "policy.seq_length")
    assert shape_to_try(config(tmp_path), "qwen2.5-7b") == preset("qwen2.5-7b")


@pytest.mark.parametrize(
    ("name", "world", "shape"),
    [
        ("qwen2.5_1.5b_one_gpu", 1, "qwen2.5-1.5b"),
        ("qwen2.5_7b_tp4", 4, "qwen2.5-7b"),
        ("qwen2.5_32b_tp8", 8, "qwen2.5-32b"),
        ("qwen2.5_32b_zero3", 8, "qwen2.5-32b"),
        ("qwen2.5_32b_tp8_pp2", 16, "qwen2.5-32b"),
    ],
)
def test_the_shipped_configs_fit_into_80_gb(name: str, world: int, shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Below what PyTorch sees of the card, with the room that the estimate asks for."""
    monkeypatch.setenv("WORLD_SIZE", str(world))
    run = parse_options(TrainConfig, ["--config", str(ROOT / f"pretrain_scripts/configs/{name}.yaml")])
    together = max(stage.total for stage in estimate(run, preset(shape))) / GIB
    assert together <= CARDS["80 GB"] - NOT_COUNTED_GIB, together


def run_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, world: int, **changes: Any) -> TrainConfig:
    monkeypatch.setenv("WORLD_SIZE", str(world))
    return config(tmp_path, **{"data.global_batch_size": 32, "dtype": "bf16", **changes})


def test_what_layers_keep_of_a_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """hidden 16, MLP 24, 2 heads of 8 with one key head, 32 rows of vocabulary."""
    whole = {"engine": "megatron"}
    plain = run_of(tmp_path, monkeypatch, 1, **whole)
    assert plain.model is not None
    assert kept_per_token(plain, plain.model) == 2 * (4 * 16 + 2 * 16 + 2 * 8 + 3 * 24)
    # One process keeps the residual stream, which both norms read, in float32.
    one = run_of(tmp_path, monkeypatch, 1)
    assert kept_per_token(one, plain.model) == 2 * (6 * 16 + 2 * 16 + 2 * 8 + 3 * 24)
    full = run_of(tmp_path, monkeypatch, 1, **{"layers.recompute_granularity": "full"})
    assert kept_per_token(full, plain.model) == 4 * 16
    exact = run_of(tmp_path, monkeypatch, 1, dtype="float64")
    assert kept_per_token(exact, plain.model) == 8 * (4 * 16 + 2 * 16 + 2 * 8 + 3 * 24)
    two = {"parallel.tensor_model_parallel_size": 2}
    split = run_of(tmp_path, monkeypatch, 2, **two)
    assert kept_per_token(split, plain.model) == 2 * (4 * 16 + (2 * 16 + 2 * 8 + 3 * 24) // 2)
    sequence = {**two, "parallel.sequence_parallel": True, "layers.recompute_granularity": "full"}
    assert kept_per_token(run_of(tmp_path, monkeypatch, 2, **sequence), plain.model) == 2 * 16 // 2
    block = {"layers.recompute_granularity": "full", "layers.recompute_method": "block", "model.num_layers": 4}
    three_of_four = run_of(tmp_path, monkeypatch, 1, **whole, **block, **{"layers.recompute_num_layers": 3})
    assert three_of_four.model is not None
    assert kept_per_token(three_of_four, three_of_four.model) == 2 * ((3 * 16 + 184) // 4)
    selective = run_of(tmp_path, monkeypatch, 1, **whole, **{"layers.recompute_granularity": "selective"})
    assert kept_per_token(selective, plain.model) == 2 * (4 * 16 + 2 * 16 + 2 * 8)


def test_what_the_output_layer_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """32 rows of vocabulary, shared by two ranks, and hidden 16: logits of a chunk beside their gradient, the gradient
    of the weight beside what a chunk adds to it, and that of the hidden states; or logits of all tokens."""
    two = {"parallel.tensor_model_parallel_size": 2}
    chunks = run_of(tmp_path, monkeypatch, 2, **two, **{"layers.loss_chunk_tokens": 3})
    tokens = chunks.data.micro_batch_size * chunks.data.seq_length
    assert chunks.model is not None and tokens > 3
    assert logits_of(chunks, chunks.model) == [(3 * 16, 2 + 2), (16 * 16, 4 + 2), (tokens * 16, 2)]
    by_default = run_of(tmp_path, monkeypatch, 2, **two)
    assert logits_of(by_default, chunks.model) == [(min(tokens, 4096) * 16, 2 + 2), (16 * 16, 4 + 2), (tokens * 16, 2)]
    at_once = {"layers.loss_chunk_tokens": 0}
    whole = run_of(tmp_path, monkeypatch, 2, **two, **at_once)
    assert logits_of(whole, chunks.model) == [(tokens * 16, 2 + 2)]
    local = run_of(tmp_path, monkeypatch, 2, **two, **at_once, **{"layers.transformer_impl": "local"})
    assert logits_of(local, chunks.model) == [(tokens * 16, 2 + 4)]
    float32 = run_of(tmp_path, monkeypatch, 2, **two, **at_once, dtype="float32")
    assert logits_of(float32, chunks.model) == [(tokens * 16, 4 + 4)]
    zero = run_of(tmp_path, monkeypatch, 2, engine="deepspeed")
    assert logits_of(zero, chunks.model) == [(tokens * 32, 2 + 2)]
    with pytest.raises(ConfigError, match="loss_chunk_tokens 3 does not go with engine deepspeed"):
        run_of(tmp_path, monkeypatch, 2, engine="deepspeed", **{"layers.loss_chunk_tokens": 3})


def test_no_more_layers_are_recomputed_than_the_memory_asks_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_of(tmp_path, monkeypatch, 1, **{"model.num_layers": 4, "layers.recompute_granularity": "selective"})
    assert run.model is not None

    def gib(layers: LayerConfig) -> float:
        return estimate(dataclasses.replace(run, layers=layers), run.model)[0].total / 2**30

    plain, two = (
        LayerConfig(),
        LayerConfig(recompute_granularity="full", recompute_method="block", recompute_num_layers=2),
    )
    assert gib(two) < gib(plain)
    assert least_recompute(run, run.model, gib(plain) + NOT_COUNTED_GIB) == plain
    assert least_recompute(run, run.model, gib(two) + NOT_COUNTED_GIB) == two
    assert least_recompute(run, run.model, gib(two) * 0.1 + NOT_COUNTED_GIB) is None


def test_the_estimate_is_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Recorded peaks of PyTorch's allocator on two GPUs; the estimate may leave out a GiB and a half."""
    rows = [json.loads(line) for line in (ROOT / "benchmarks/results/training_layouts_h200.jsonl").open()]
    monkeypatch.setenv("WORLD_SIZE", "2")
    compared = 0
    for row in rows:
        layout, whole = (
            layouts(2).get(row["layout"]),
            re.fullmatch(r"(qwen2.5-7b|qwen2.5-32b), (\d+) layers", row["model"]),
        )
        if row["gpus"] != 2 or not whole or layout is None or row["layout"] in AFTER_OTHERS:
            continue
        count, tokens = re.findall(r"(\d+) x (\d+)", row["rows"])[0]
        options = Options(model=whole[1], num_layers=int(whole[2]), rows=int(count), tokens=int(tokens))
        model = shape_of(options)
        run = run_config(options, model, layout)
        if first := re.search(r"first (\d+) layers", row["recompute"]):
            block = {"recompute_granularity": "full", "recompute_method": "block"}
            run = dataclasses.replace(run, layers=LayerConfig(recompute_num_layers=int(first[1]), **block))
        layers = dataclasses.replace(run.layers, loss_chunk_tokens=row.get("loss_chunk_tokens", 0))
        if "loss_chunk_tokens" not in row:  # of commits that took megatron-core's own cross entropy
            layers = dataclasses.replace(layers, transformer_impl="local")
        run = dataclasses.replace(run, layers=layers)
        found = max(stage.total for stage in estimate(run, model)) / 2**30
        if row["commit"] == "53b6c63":  # the gradient of a chunk's logits still lay beside the next chunk
            (chunk, _), *_ = logits_of(run, model)
            found += 2 * chunk / 2**30
        assert 0 < row["peak_gib"] - found < 1.5, row
        compared += 1
    assert compared >= 17


def test_the_table_of_layouts_says_what_the_estimate_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """In every row the recompute is the least that fits, and the memory what remains."""
    text = (ROOT / "docs/training.md").read_text(encoding="utf-8")
    pattern = r"^\| Qwen(2.5-\S+) \| (\d+) of (\d+ GB) \| (.*) \| (?:(\d+) of \d+|none) \| ([\d.]+) \|$"
    rows = re.findall(pattern, text, re.MULTILINE)
    assert len(rows) == 16
    for name, gpus, card, layout, recomputed, gib in rows:
        monkeypatch.setenv("WORLD_SIZE", gpus)
        cut = {kind: int(size) for kind, size in re.findall(r"\b(TP|CP|PP)(\d)", layout)}
        sizes = {f"{part}_parallel_size": cut.get(f"{part[0].upper()}P", 1) for part in ("tensor_model", "context")}
        sizes |= {"pipeline_model_parallel_size": cut.get("PP", 1), "sequence_parallel": "TP" in cut}
        how: dict[str, Any] = {"engine": "megatron", "parallel": sizes}
        if "ZeRO 3" in layout:
            offload = "cpu" if "optimizer on the host" in layout else "none"
            how |= {"engine": "deepspeed", "deepspeed": {"zero_stage": 3, "offload_optimizer": offload}}
        options = Options(model=f"qwen{name.lower()}", rows=16)
        options.num_layers = preset(options.model).num_layers
        run, model = run_config(options, shape_of(options), how), shape_of(options)
        layers = least_recompute(run, model, CARDS[card])
        assert layers is not None, (name, layout)
        count = "" if layers.recompute_granularity is None else str(layers.recompute_num_layers)
        stages = estimate(dataclasses.replace(run, layers=layers), model)
        found = f"{max(stage.total for stage in stages) / GIB:.1f}"
        assert (recomputed, gib) == (count, found), (name, layout)


def test_earlier_stages_hold_more_microbatches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    four = {"parallel.pipeline_model_parallel_size": 4}
    run = run_of(tmp_path, monkeypatch, 4, **four)
    assert [layers_in_flight(run, 2, stage) for stage in range(4)] == [8, 6, 4, 2]
    few = run_of(tmp_path, monkeypatch, 4, **four, **{"data.global_batch_size": 4})
    assert [layers_in_flight(few, 2, stage) for stage in range(4)] == [4, 4, 4, 2]
    interleaved = run_of(tmp_path, monkeypatch, 4, **four, **{"parallel.virtual_pipeline_model_parallel_size": 2})
    assert [layers_in_flight(interleaved, 2, stage) for stage in range(4)] == [11, 9, 7, 5]


def test_what_zero_shares(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """bf16 weights, float32 gradients, float32 weights and two moments: 2 + 4 + 12 bytes."""

    def state(**changes: Any) -> StateBytes:
        zero = {f"deepspeed.{name}": value for name, value in changes.items()}
        return state_bytes(run_of(tmp_path, monkeypatch, 8, engine="deepspeed", **zero))

    assert state(zero_stage=1) == StateBytes((2, 1), (4, 1), (12, 8), (0, 8))
    assert state(zero_stage=2) == StateBytes((2, 1), (4, 8), (12, 8), (0, 8))
    assert state(zero_stage=3) == StateBytes((2, 8), (4, 8), (12, 8), (0, 8))
    assert state(zero_stage=1, offload_optimizer="cpu") == StateBytes((2, 1), (4, 1), (0, 8), (12, 8))
    everything = {"offload_optimizer": "cpu", "offload_param": "cpu"}
    assert state(zero_stage=3, **everything) == StateBytes((0, 8), (0, 8), (0, 8), (18, 8))
    megatron = run_of(tmp_path, monkeypatch, 8)
    assert state_bytes(megatron) == StateBytes((2, 1), (4, 1), (12, 8)) and gathered(megatron, 10) == []


def test_zero_3_gathers_as_much_as_deepspeed_is_told_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own.json").write_text('{"zero_optimization": {"reduce_bucket_size": 7}}')
    own = {"engine": "deepspeed", "deepspeed.config": str(tmp_path / "own.json")}
    assert gathered(run_of(tmp_path, monkeypatch, 8, **own), 100) == [(100, 2), (7, 4)]
