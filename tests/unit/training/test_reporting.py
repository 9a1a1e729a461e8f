from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_multiverse.config import OptimConfig
from megatron_multiverse.errors import ConfigError, DataError
from megatron_multiverse.model.families import preset, qwen3
from megatron_multiverse.model.gpt import build_gpt_model
from megatron_multiverse.training.flops import matmul_parameters, peak_of, peak_tflops, training_flops
from megatron_multiverse.training.metrics import MetricsWriter, format_duration
from megatron_multiverse.training.optim import build_optimizer, build_scheduler
from megatron_multiverse.views.loss_curves import plot_loss, read_histories, read_history, running_mean
from tests.forked import run_forked


def write_metrics(folder: Path, *records: dict) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))


def line(kind: str, step: int, **values: object) -> dict:
    return {"kind": kind, "step": step, "lr": 1e-3, **values}


def test_steps_done_again_after_a_crash_replace_the_lost_ones(tmp_path: Path) -> None:
    write_metrics(
        tmp_path / "run",
        line("start", 0, resumed=False),
        *(line("train", s, loss=10.0 - s) for s in range(1, 6)),
        line("valid", 5, loss=9.0),
        line("start", 3, resumed=True),
        line("train", 4, loss=1.0),
    )
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "st')  # killed while writing
    history = read_history(tmp_path / "run")
    assert {s: r["loss"] for s, r in history.train.items()} == {1: 9.0, 2: 8.0, 3: 7.0, 4: 1.0}
    assert history.valid == {} and history.resumes == [3]
    plot_loss([tmp_path / "run"], tmp_path / "out" / "loss.png")
    assert (tmp_path / "out" / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_runs_of_one_name_are_told_apart_by_their_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["a/x/run", "b/x/run", "b/other", "c/checkpoints"]
    for name in names:
        write_metrics(tmp_path / name, line("train", 1, loss=1.0))
    read = read_histories([tmp_path / name for name in names])
    assert [history.name for history in read] == ["a/x/run", "b/x/run", "other", "c"]
    assert [history.name for history in read_histories([tmp_path / names[0]])] == ["run"]
    monkeypatch.chdir(tmp_path / "b/other")
    assert [history.name for history in read_histories([Path("."), Path("../x/run")])] == ["other", "run"]
    with pytest.raises(ConfigError, match=rf"^--runs names {tmp_path}/b/other twice"):
        read_histories([Path("."), tmp_path / "b/other"])


def test_unreadable_metrics_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        read_history(tmp_path)
    write_metrics(tmp_path, line("start", 0, resumed=False))
    with pytest.raises(DataError, match="no training steps"):
        read_history(tmp_path)


def test_damaged_lines_are_passed_over_and_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A crash may cut off a line anywhere, also within a character, and the next run goes on after it."""
    write_metrics(tmp_path, line("train", 1, loss=2.0))
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b'{"kind": "tr\xe2\n[]\n{}\n{"kind": "train", "step": 2, "loss": null}\n')
    write = json.dumps(line("train", 3, loss=1.0))
    with (tmp_path / "metrics.jsonl").open("a") as text:
        text.write(write + "\n")
    assert sorted(read_history(tmp_path).train) == [1, 2, 3]
    assert "3 damaged lines are passed over (line 2, 3, 4)" in caplog.text
    plot_loss([tmp_path], tmp_path / "loss.png", smooth=2)  # a record without lr or loss is a gap


def test_what_cannot_be_drawn_is_refused(tmp_path: Path) -> None:
    write_metrics(tmp_path, line("train", 1, loss=2.0))
    for smooth in (0, -1):
        with pytest.raises(ConfigError, match=f"smooth is {smooth}, but a running mean needs at least 1 line"):
            plot_loss([tmp_path], tmp_path / "loss.png", smooth=smooth)
    with pytest.raises(ConfigError, match=r"cannot draw .*loss\.txt: end its name in .*\.png"):
        plot_loss([tmp_path], tmp_path / "loss.txt")
    assert not list(tmp_path.glob("loss.*"))


def test_a_log_line_tells_the_speed_of_each_rank_where_there_are_several(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    numbers = {"loss": 1.0, "grad_norm": 1.0, "step_time_s": 1.0, "mfu": 0.5, "memory_gib": 2.0}
    with caplog.at_level("INFO"):
        for ranks in (1, 8):
            speed = {"tokens_per_s": 8192.0, "tokens_per_s_per_rank": 8192.0 / ranks}
            writer = MetricsWriter(tmp_path, 10)
            writer.train(5, numbers | speed, 1e-3, 40)
            writer.close()
    whole = (
        "step 5/10 | loss 1.0000 | lr 1.000e-03 | grad norm 1.000 | 8192 tokens/s{} | MFU 50.0 % | 2.00 GiB | "
        "ETA 0:00:05"
    )
    assert caplog.messages == [whole.format(""), whole.format(", 1024 per rank")]


def test_the_tool_takes_hyphens(tmp_path: Path) -> None:
    write_metrics(tmp_path, line("train", 1, loss=2.0), line("train", 2, loss=1.0))
    tool = Path(__file__).parents[3] / "tools" / "plot_loss.py"
    given = ["--runs", str(tmp_path), "--output", str(tmp_path / "loss.png"), "--log-scale", "--smooth", "2"]
    done = run_forked(tool, *given)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "loss.png").is_file()


def test_running_mean_and_duration() -> None:
    np.testing.assert_allclose(running_mean([1, 2, 3, 7], 2), [1, 1.5, 2.5, 5])
    nan = float("nan")  # a step whose loss is not known spoils no other
    np.testing.assert_allclose(running_mean([1, nan, 3, nan, nan, 2], 2), [1, 1, 3, 3, nan, 2])
    assert format_duration(3723.4) == "1:02:03"


def test_flops_are_those_of_the_matrix_products() -> None:
    """Counted by torch on the real forward pass; attention replaced by what a causal mask lets through."""
    from torch.utils.flop_counter import FlopCounterMode

    config = qwen3(
        num_layers=2, hidden_size=32, ffn_hidden_size=48, num_attention_heads=4, num_query_groups=2,
        kv_channels=8, vocab_size=64, max_sequence_length=16,
    )  # fmt: skip
    model = build_gpt_model(config)
    shapes = [p.numel() for n, p in model.named_parameters() if p.ndim == 2]
    assert matmul_parameters(config) == sum(shapes)  # tied: the embedding counts once, as the output layer
    x = torch.zeros(5, 1, 32)
    with FlopCounterMode(display=False) as counter:
        model.decoder.layers[0].mlp(x)
    assert counter.get_total_flops() == 2 * 5 * 3 * 32 * 48
    pairs = training_flops(config, 0, 7)
    assert pairs == 3 * 7 * (2 * 8 + 2 * 8) * 4 * 2  # forward and backward, q.k and p.v, heads, layers
    # Qwen2.5-32B: 6 N per token, plus attention at 8K tokens causal
    big = preset("qwen2.5-32b")
    assert training_flops(big, 1, 0) == pytest.approx(6 * (32.76e9 - 152064 * 5120), rel=0.01)


def test_unknown_devices_have_no_peak() -> None:
    assert peak_tflops(torch.device("cpu"), "float32") is None
    assert peak_tflops(torch.device("cpu"), "float32", 2.5) == 2.5


@pytest.mark.parametrize(
    ("name", "bf16"),
    [
        ("NVIDIA H200", 989.4),
        ("NVIDIA H200 NVL", 835.5),
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 NVL", 835.5),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA GH200 480GB", 989.4),
        ("NVIDIA A100-SXM4-80GB", 311.9),
        ("NVIDIA A100 80GB PCIe", 311.9),
        ("NVIDIA B200", 2250.0),
        ("NVIDIA GB200", None),
        ("NVIDIA H20", 148.0),
        ("Tesla T4", None),
    ],
)
def test_peaks_are_those_of_the_very_part(name: str, bf16: float | None) -> None:
    assert peak_of(name, "bf16") == bf16
    assert peak_of(name, "float32") == (None if bf16 is None else bf16 / 2)


@pytest.mark.parametrize(
    ("changes", "is_told"),
    [
        ({"lr_decay_iters": 4}, True),
        ({"lr_decay_iters": 4, "lr_decay_style": "wsd"}, True),
        ({"lr_decay_iters": 4, "min_lr": 0.1}, False),
        ({"lr_decay_iters": 4, "lr_decay_style": "constant"}, False),
        ({"lr_decay_iters": 6}, False),
        ({}, False),
    ],
)
def test_steps_with_a_learning_rate_of_zero_are_told_at_the_start(changes, is_told, caplog) -> None:
    config = OptimConfig(lr=1.0, **changes)
    optimizer = build_optimizer(torch.nn.Linear(2, 2), config)
    scheduler, rates = build_scheduler(optimizer, config, 6), []
    for _ in range(6):
        scheduler.step(1)
        rates.append(optimizer.param_groups[0]["lr"])
    assert (rates[3:] == [0, 0, 0]) == is_told, "that it is so, and that it is told"
    assert ("the learning rate is 0 from step 4 on, so that the steps up to 6 train nothing" in caplog.text) == is_told


@pytest.mark.parametrize(
    ("style", "want"),
    [
        ("constant", [0.5, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ("cosine", [0.5, 1.0, *(0.1 + 0.45 * (1 + np.cos(np.pi * k / 4)) for k in range(1, 5))]),
        ("wsd", [0.5, 1.0, 1.0, 1.0, 0.55, 0.1]),
    ],
)  # fmt: skip
def test_learning_rates(style, want) -> None:
    config = OptimConfig(lr=1.0, min_lr=0.1, lr_warmup_iters=2, lr_decay_style=style, lr_wsd_decay_iters=2)
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.LayerNorm(2))
    optimizer = build_optimizer(model, OptimConfig(lr=1.0, weight_decay=0.1))
    scheduler = build_scheduler(optimizer, OptimConfig(**{**vars(config), "weight_decay": 0.1}), 6)
    got = []
    for _ in range(6):
        scheduler.step(1)
        got.append(optimizer.param_groups[0]["lr"])
    assert got == pytest.approx(want)
    assert [(len(g["params"]), g["weight_decay"]) for g in optimizer.param_groups] == [(1, 0.1), (3, 0.0)]
