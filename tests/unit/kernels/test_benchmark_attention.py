from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.kernels import attention as benchmark
from benchmarks.kernels import plot
from benchmarks.kernels.attention_rivals import Rival
from benchmarks.kernels.cases import make_r
from megatron_multiverse.errors import ConfigError
from megatron_multiverse.kernels.multiverse_attention import multiverse_attention_reference, visibility


def test_what_results_are_checked_against_is_the_definition_and_its_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several steps of rows, two key/value heads; a function with the wrong mask is found out."""
    n = 3000
    monkeypatch.setattr(benchmark, "ROWS_TIMES_KEYS", 400 * n)
    inputs = benchmark.Inputs(n, 4, 2, 16, device="cpu")
    r = make_r("deep", n)

    def masked(visible: torch.Tensor) -> benchmark.Attention:
        return lambda q, k, v: multiverse_attention_reference(q.float(), k.float(), v.float(), visible)

    right, wrong = visibility(r), visibility(torch.arange(n)[None])
    rivals = [Rival("right", masked(right)), Rival("wrong", masked(wrong))]
    found = benchmark.errors(inputs, rivals, r[0])
    assert max(found["right"]) < 5e-3  # gradients come back in bfloat16
    assert min(found["wrong"]) > 0.05


def test_a_long_case_of_a_single_head_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "MAIN", 16)
    inputs, r = benchmark.Inputs(32, 2, 1, 8, device="cpu"), torch.arange(32)
    rival = Rival("x", lambda q, k, v: multiverse_attention_reference(q, k, v, visibility(r[None])))
    assert max(benchmark.errors(inputs, [rival], r)["x"]) < 0.05


class Clock:
    """A CUDA event that takes 30 ms to the next one."""

    def record(self) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, other: Clock) -> float:
        return 30.0


def test_every_attention_function_gets_its_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph that can be walked once gets a new forward pass for each backward pass, outside the timing."""
    monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: Clock())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    inputs, calls = benchmark.Inputs(8, 4, 2, 4, device="cpu"), []

    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        calls.append(q.shape)
        return q * k.mean() * v.mean()

    assert benchmark.measure(inputs, [Rival("kept", call)], 2) == {"kept": (30.0, 30.0)}
    kept = len(calls)
    assert kept == 1 + 2 + 2 * (1 + 3)
    assert benchmark.measure(inputs, [Rival("once", call, keeps_graph=False)], 2) == {"once": (30.0, 30.0)}
    assert len(calls) - kept == 2 * (kept - 1)


def test_the_plot_shows_every_layout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    lines = [
        {
            "tokens": 8,
            "layout": layout,
            "attention": name,
            "gpu": "X",
            "visible": 0.5,
            "heads": 1,
            "groups": 1,
            "dim": 4,
        }
        | {"commit": "c", "fwd_tflops": 1.0, "bwd_tflops": 2.0, "fwd_ms": 1.0, "bwd_ms": 2.0}
        for layout in ("a", "b")
        for name in ("cuDNN causal (SDPA)", "flash4")
    ]
    file = tmp_path / "attention_x.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in [*lines, {"tokens": 8, "prepare_us": 1.0}]))
    shape = {"heads": 1, "groups": 1, "dim": 4}
    rows = plot.read(file, tokens=8, **shape)
    assert list(rows) == ["a", "b"] and not plot.read(file, tokens=9, **shape)
    assert not plot.read(file, tokens=8, **shape | {"dim": 8})
    assert plot.drawn_names(rows) == ["cuDNN causal (SDPA)", "flash4"]
    monkeypatch.setattr("sys.argv", ["plot", "--input", str(file), "--tokens", "8", "--heads", "1"])
    with pytest.raises(ConfigError, match=r"has no rows of .*'groups': 8"):
        plot.main()
    monkeypatch.setattr("sys.argv", [*sys.argv, "--groups", "1", "--dim", "4"])
    plot.main()
    assert (tmp_path / "attention_x_8.png").stat().st_size > 10_000
