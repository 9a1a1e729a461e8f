from __future__ import annotations

import json
import random
import statistics
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.kernels import record
from benchmarks.kernels.cases import CASES, TAG_IDS, document, make_labels
from megatron_multiverse import checkout
from megatron_multiverse.errors import ConfigError
from megatron_multiverse.kernels.multiverse_attention import visibility


@pytest.mark.parametrize("name", CASES)
def test_pairs_that_throughput_is_counted_on_are_those_of_the_mask(name: str) -> None:
    r, pairs = make_labels(name, 8192)
    assert len(set(r[0].tolist())) == 8192
    assert int(visibility(r).sum()) == pairs
    assert (pairs == 8192 * 8193 // 2) == (name == "causal")


def test_the_recorded_command_can_be_run_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["attention.py", "--lengths", "512", "--output", "/tmp/x", "--dim", "64"])
    assert record._arguments() == ["--lengths", "512", "--dim", "64"]


def test_the_realistic_document_has_the_statistics_of_the_data() -> None:
    """24 documents: a path has 169 tokens in the mean and 56 in the median, a block 2.35 paths, 52 of 185 blocks are
    nested, 41 % of the tokens stand in paths."""
    n = 400_000
    ids = document(random.Random(1), n)
    parallel, end_parallel, end_goal, end_path = (TAG_IDS[tag] for tag in (2, 3, 5, 9))
    paths, begins, blocks, nested, in_paths, depth = [], [], 0, 0, 0, 0
    for i, token in enumerate(ids):
        if token == parallel:
            blocks, nested, depth = blocks + 1, nested + (depth > 0), depth + 1
        elif token == end_parallel:
            depth -= 1
            begins.pop()
        elif token == end_goal:
            begins.append(i + 1)
        elif token == end_path:
            paths.append(i + 1 - begins[-1])
            in_paths += paths[-1] if depth == 1 else 0
            begins[-1] = i + 1
    assert statistics.mean(paths) == pytest.approx(169, rel=0.1)
    assert statistics.median(paths) == pytest.approx(56, rel=0.1)
    assert len(paths) / blocks == pytest.approx(2.35, rel=0.05)
    assert nested / (blocks - nested) == pytest.approx(52 / 133, rel=0.1)
    assert in_paths / n == pytest.approx(0.41, rel=0.07)


def rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_running_a_case_again_replaces_that_case_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = {"gpu": "NVIDIA X", "versions": {"torch": "2"}, "command": "c", "date": "d"}
    monkeypatch.setattr(record, "environment", lambda commit, command: made | {"commit": commit})
    first = record.Recorder("speed", str(tmp_path), "one", key=("case", "tokens"))
    first.add(case="a", tokens=8, ms=1.0)
    first.add(case="b", tokens=8, ms=2.0, tags=6)
    second = record.Recorder("speed", str(tmp_path), "two", key=("case", "tokens"))
    second.add(case="b", tokens=8, ms=3.00001, tags=7)  # what is measured may be whole numbers, too
    second.add(case="b", tokens=16, ms=4.0)
    second.table("note")
    got = [(x["case"], x["tokens"], x["ms"], x["commit"]) for x in rows(tmp_path / "speed_x.jsonl")]
    assert got == [("a", 8, 1.0, "one"), ("b", 8, 3.0, "two"), ("b", 16, 4.0, "two")]
    table = (tmp_path / "speed_x.md").read_text()
    assert "| a | 8 | 1.0 |  | one |" in table and "| b | 16 | 4.0 |  | two |" in table
    assert table.endswith("- one, d, torch 2: `c`\n- two, d, torch 2: `c`\n")


def test_a_benchmark_without_a_gpu_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="needs a CUDA GPU, none is visible"):
        record.Recorder("speed", str(tmp_path), None, key=("case",))


@pytest.mark.parametrize(
    ("told", "changes", "commit"), [(None, "", "abc"), (None, " M file", "abc-dirty"), ("def", " M file", "def")]
)
def test_a_changed_working_tree_is_named(
    told: str | None, changes: str, commit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "X")
    said = {"--show-toplevel": str(checkout.ROOT), "--short": "abc", "--porcelain": changes}
    monkeypatch.setattr(checkout, "_git", lambda verb, option, *rest: said[option])
    assert record.environment(told)["commit"] == commit
