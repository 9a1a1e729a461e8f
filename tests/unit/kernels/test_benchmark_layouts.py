from __future__ import annotations

import sys

import pytest

from megatron_multiverse.kernels.benchmarks import record
from megatron_multiverse.kernels.benchmarks.layouts import LAYOUTS, make_labels
from megatron_multiverse.kernels.multiverse_attention import visibility


@pytest.mark.parametrize("name", LAYOUTS)
def test_pairs_that_throughput_is_counted_on_are_those_of_the_mask(name: str) -> None:
    r, pairs = make_labels(name, 8192)
    assert len(set(r[0].tolist())) == 8192
    assert int(visibility(r).sum()) == pairs
    assert (pairs == 8192 * 8193 // 2) == (name == "causal")


def test_the_recorded_command_can_be_run_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["attention.py", "--lengths", "512", "--output", "/tmp/x", "--dim", "64"])
    assert record._arguments() == ["--lengths", "512", "--dim", "64"]
