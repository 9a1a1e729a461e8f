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

from .runs import LIMIT_S, numbers, train_on, train_rank

SETTINGS: dict[str, Any] = {"train_iters": 8, "checkpoint.save_interval": 1}
KILLS = int(os.environ.get("MULTIVERSE_KILLS", "1"))
"""How often the run is killed; more for a thorough search."""


def train_until_killed(data: Path, save: Path, changes: Mapping[str, Any], after_s: float) -> None:
    """Train, and be killed so long after the first new step, or at the end; a save takes most of that time."""
    before = (save / "metrics.jsonl").stat().st_size if (save / "metrics.jsonl").exists() else 0

    ended = threading.Event()  # a run that was killed at its end has no step left

    def has_trained() -> bool:
        return (save / "metrics.jsonl").exists() and b'"train"' in (save / "metrics.jsonl").read_bytes()[before:]

    def kill() -> None:
        while not has_trained() and not ended.is_set():
            time.sleep(0.01)
        time.sleep(after_s)
        os.kill(os.getpid(), signal.SIGKILL)

    killing = threading.Thread(target=kill, daemon=True)
    if torch.distributed.get_rank() == 1:
        killing.start()
    train_rank(data, save, 2, changes)
    ended.set()
    if torch.distributed.get_rank() == 1:
        killing.join()


@pytest.fixture(scope="module")
def straight(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing stops."""
    folder = tmp_path_factory.mktemp("straight")
    train_on(2, data, folder, **SETTINGS)
    return folder


@pytest.mark.parametrize("beside", [False, True], ids=["waiting", "beside the training"])
def test_a_run_that_is_killed_at_random_moments_ends_with_the_same_bits(
    data: Path, tmp_path: Path, straight: Path, beside: bool
) -> None:
    settings = {**SETTINGS, "checkpoint.async_save": beside}
    rng = random.Random(0)
    killed = 0
    for _ in range(KILLS):
        try:
            after_s = rng.uniform(0.05, 0.6)
            run_ranks(train_until_killed, 2, data, tmp_path, settings, after_s, timeout=LIMIT_S)
        except RankError:
            killed += 1
    train_on(2, data, tmp_path, **settings)
    assert killed
    assert_same_run(straight, tmp_path)


def assert_same_run(straight: Path, folder: Path) -> None:
    """The second run, whose steps may have been done twice, has the curve and the weights of the first one."""
    expected = numbers(straight)
    newest = newest_rows(folder)
    for column in ("loss", "grad_norm", "loss_tokens"):
        assert [newest[step][column] for step in range(1, 9)] == expected[column]
    one, other = (load_file(run / "model/model.safetensors") for run in (straight, folder))
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    assert not list(folder.glob("iter_*.partial"))


def newest_rows(folder: Path) -> dict[int, Any]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return {row["step"]: row for row in map(json.loads, lines) if row["kind"] == "train"}


def die_in_a_write(data: Path, save: Path) -> None:
    """The whole run dies once two more steps are done beside a file of which a half is written."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    def half(transforms: Any, number: int, bucket: Any, *args: Any) -> None:
        Path(bucket[0]).write_bytes(b"half")
        while 5 not in newest_rows(save):
            time.sleep(0.01)
        os.kill(os.getppid(), signal.SIGKILL)
        time.sleep(60)  # the kernel ends this process, too

    before = filesystem_async.FileSystemWriterAsync.write_preloaded_data

    def write(transforms: Any, number: int, bucket: Any, *args: Any) -> Any:
        return (half if "iter_0000003" in bucket[0] else before)(transforms, number, bucket, *args)

    filesystem_async.FileSystemWriterAsync.write_preloaded_data = write
    train_rank(data, save, 2, {"train_iters": 8, "checkpoint.save_interval": 3, "checkpoint.async_save": True})


def test_a_run_that_is_killed_in_the_middle_of_a_write_beside_it_does_not_load_the_half(
    data: Path, tmp_path: Path, straight: Path
) -> None:
    """Not even where nothing else is there."""
    with pytest.raises(RankError):
        run_ranks(die_in_a_write, 2, data, tmp_path, timeout=LIMIT_S)
    (partial,) = tmp_path.glob("iter_*")
    assert partial.name == "iter_0000003.partial" and b"half" in [file.read_bytes() for file in partial.iterdir()]
    assert not (tmp_path / "latest_checkpointed_iteration.txt").exists() and 5 in newest_rows(tmp_path)
    train_on(2, data, tmp_path, **SETTINGS)
    assert_same_run(straight, tmp_path)


def fail_on_one_rank(data: Path, save: Path) -> None:
    from megatron.core import dist_checkpointing

    if torch.distributed.get_rank() == 1:

        def broken(*args: Any, **options: Any) -> None:
            raise OSError("no space left")

        dist_checkpointing.save = broken
    train_rank(data, save, 2, {"train_iters": 3})


def test_a_rank_that_cannot_write_stops_the_run_and_nothing_is_in_force(data: Path, tmp_path: Path) -> None:
    with pytest.raises(RankError, match="no space left"):
        run_ranks(fail_on_one_rank, 2, data, tmp_path, timeout=LIMIT_S)
    assert not (tmp_path / "latest_checkpointed_iteration.txt").exists()
    assert numbers(tmp_path)["loss"]


def fail_in_the_background(data: Path, save: Path) -> str:
    """The second rank's writer of the second checkpoint finds no space; what each rank says."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    from megatron_multiverse.errors import CheckpointError

    before = filesystem_async.FileSystemWriterAsync.write_preloaded_data

    def write(transforms: Any, number: int, bucket: Any, *args: Any) -> Any:
        if "iter_0000004" in bucket[0] and "__1_" in bucket[0]:
            raise OSError("no space left")
        return before(transforms, number, bucket, *args)

    filesystem_async.FileSystemWriterAsync.write_preloaded_data = write
    settings = {"train_iters": 8, "checkpoint.save_interval": 2, "checkpoint.async_save": True}
    try:
        train_rank(data, save, 2, {**settings, "parallel.tensor_model_parallel_size": 2})
    except CheckpointError as error:
        return str(error)
    return "nothing"


def test_a_rank_that_cannot_write_in_the_background_stops_all_and_the_last_checkpoint_stays(
    data: Path, tmp_path: Path
) -> None:
    first, second = run_ranks(fail_in_the_background, 2, data, tmp_path, timeout=LIMIT_S)
    assert "iter_0000004 cannot be written" in first and "no space left" in first
    assert "iter_0000004 cannot be written" in second
    assert (tmp_path / "latest_checkpointed_iteration.txt").read_text() == "2\n"
    assert not (tmp_path / "iter_0000004").exists()
