"""A run on several ranks that is cut off anywhere goes on bit for bit."""

from __future__ import annotations

import json
import os
import random
import signal
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_multiverse.errors import RankError
from megatron_multiverse.parallel.local_ranks import run_ranks

from .runs import numbers, train_on, train_rank

SETTINGS: dict[str, Any] = {"train_iters": 8, "checkpoint.save_interval": 1}
KILLS = int(os.environ.get("MULTIVERSE_KILLS", "1"))
"""How often the run is killed; more for a thorough search."""


def train_until_killed(data: Path, save: Path, changes: Mapping[str, Any], after_s: float) -> None:
    """Train, and be killed so long after the first new step; a save takes most of that time."""
    before = (save / "metrics.jsonl").stat().st_size if (save / "metrics.jsonl").exists() else 0

    def kill() -> None:
        while not (save / "metrics.jsonl").exists() or b'"train"' not in (save / "metrics.jsonl").read_bytes()[before:]:
            time.sleep(0.01)
        time.sleep(after_s)
        os.kill(os.getpid(), signal.SIGKILL)

    if torch.distributed.get_rank() == 1:
        threading.Thread(target=kill, daemon=True).start()
    train_rank(data, save, 2, changes)


def test_a_run_that_is_killed_at_random_moments_ends_with_the_same_bits(data: Path, tmp_path: Path) -> None:
    straight = train_on(2, data, tmp_path / "straight", **SETTINGS)
    rng = random.Random(0)
    killed = 0
    for _ in range(KILLS):
        try:
            run_ranks(train_until_killed, 2, data, tmp_path / "killed", SETTINGS, rng.uniform(0.05, 0.6), timeout=240)
        except RankError:
            killed += 1
    resumed = train_on(2, data, tmp_path / "killed", **SETTINGS)
    assert killed
    lines = (tmp_path / "killed/metrics.jsonl").read_text().splitlines()
    newest = {row["step"]: row for row in map(json.loads, lines) if row["kind"] == "train"}
    for column in ("loss", "grad_norm", "loss_tokens"):
        assert [newest[step][column] for step in range(1, 9)] == straight[column]
    assert len(resumed["loss"]) >= 8
    one, other = (load_file(tmp_path / name / "model/model.safetensors") for name in ("straight", "killed"))
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    assert not list((tmp_path / "killed").glob("iter_*.partial"))


def fail_on_one_rank(data: Path, save: Path) -> None:
    from megatron.core import dist_checkpointing

    if torch.distributed.get_rank() == 1:

        def broken(*args: Any) -> None:
            raise OSError("no space left")

        dist_checkpointing.save = broken
    train_rank(data, save, 2, {"train_iters": 3})


def test_a_rank_that_cannot_write_stops_the_run_and_nothing_is_in_force(data: Path, tmp_path: Path) -> None:
    with pytest.raises(RankError, match="no space left"):
        run_ranks(fail_on_one_rank, 2, data, tmp_path, timeout=120)
    assert not (tmp_path / "latest_checkpointed_iteration.txt").exists()
    assert numbers(tmp_path)["loss"]
