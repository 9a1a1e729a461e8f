"""The files of a checkpoint hold the state as it was when their writing began, wherever its tensors lay."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch import Tensor

from megatron_multiverse.checksums import checksum
from megatron_multiverse.model.cpu import device_neutral_cuda
from megatron_multiverse.training import state_writing
from megatron_multiverse.training.checkpoint import begin_saving
from megatron_multiverse.training.host_memory import HostMemory

from .test_checkpoint import new_state
from .test_saver import gate  # noqa: F401 (a fixture)

Place = Callable[[Tensor, HostMemory], Tensor]
PLACES: dict[str, Place] = {
    "plain": lambda tensor, host: tensor.clone(),
    "part of a buffer": lambda tensor, host: torch.stack([tensor, tensor])[1],
    "shared with other processes": lambda tensor, host: tensor.clone().share_memory_(),
    "gathered": lambda tensor, host: host.copy(tensor),
}


@pytest.fixture(autouse=True)
def one_rank() -> Iterator[None]:
    new_state(0, True)  # which makes megatron-core's groups
    yield


def halves(key: str, tensor: Tensor) -> ShardedTensorFactory:
    """As megatron-core stores a gated MLP: one tensor, of which each half is a shard."""

    def build(key: str, tensor: Tensor, replica: object, flattened: object) -> list[ShardedTensor]:
        return [ShardedTensor.from_rank_offsets(key, half, (0, k, 2)) for k, half in enumerate(tensor.chunk(2))]

    return ShardedTensorFactory(key, tensor, build, torch.cat)


def written(folder: Path, *names: str) -> dict[str, Tensor]:
    names = names or ("whole", "halves")
    wanted = {name: ShardedTensor.from_rank_offsets(name, torch.zeros(8, 6)) for name in names}
    with device_neutral_cuda():
        loaded: dict[str, Tensor] = dist_checkpointing.load(wanted, str(folder))
    return {name: loaded[name] for name in wanted}


@pytest.mark.parametrize("place", PLACES)
def test_what_changes_afterwards_does_not_reach_the_files(
    tmp_path: Path,
    gate: Path,  # noqa: F811
    place: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nor is a tensor copied in front that need not be."""
    host, source = HostMemory(), torch.randn(2, 8, 6)
    whole, pair = (PLACES[place](tensor, host) for tensor in source)
    before = host.size
    (tmp_path / "state").mkdir()
    state = {"a": ShardedTensor.from_rank_offsets("whole", whole), "b": halves("halves", pair)}
    monkeypatch.setattr(state_writing, "checksum", None)  # the writers work it out on the way
    writing = state_writing.begin_writing(state, tmp_path / "state", host)
    if place != "gathered":  # that memory is the checkpoint's until it is written
        whole.fill_(-1)
        pair.fill_(-1)
    gate.unlink()
    checksums = writing.finish()
    assert all(torch.equal(found, source[k]) for k, found in enumerate(written(tmp_path / "state").values()))
    # Of what other processes can change, megatron-core has cloned the views.
    assert host.size - before == (whole.numel() * whole.itemsize if place == "shared with other processes" else 0)
    assert len(checksums) == 2
    assert checksums == {name: checksum(tmp_path / "state" / name) for name in checksums}
    assert writing.seconds.keys() == {"plan_s", "copy_s", "fork_s", "write_s"} and writing.seconds["write_s"] > 0


def test_views_are_not_copied_before_they_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """megatron-core would clone each of them while training waits."""
    tensor, seen = torch.randn(8, 6), list[Tensor]()
    staged = state_writing._staged

    def record(bucket: state_writing.Bucket, host: HostMemory) -> state_writing.Bucket:
        seen.extend(tensor for _, tensor in bucket[2][1])
        return staged(bucket, host)

    monkeypatch.setattr(state_writing, "_staged", record)
    state_writing.begin_writing({"a": halves("halves", tensor), "x": 1}, tmp_path, HostMemory()).finish()
    assert {part.data_ptr() for part in seen} == {half.data_ptr() for half in tensor.chunk(2)}


def test_training_says_that_it_waits_for_a_disk(
    tmp_path: Path,
    gate: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(state_writing, "_QUIET_S", 0.05)
    (tmp_path / "state").mkdir()
    state = {"a": ShardedTensor.from_rank_offsets("whole", torch.zeros(8, 6))}
    writing = state_writing.begin_writing(state, tmp_path / "state", HostMemory())
    threading.Timer(0.5, gate.unlink).start()
    (name,) = writing.finish()
    assert caplog.text.count(f"{tmp_path / 'state' / name} (0.0 MiB are there)") > 1
    assert set(written(tmp_path / "state", "whole")) == {"whole"}


def test_a_state_that_is_staged_as_on_a_gpu_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tensor is copied, in memory that the second save finds again."""
    state, contents, sizes = new_state(0, True), [], []
    for name in ("fork", "staged", "again"):
        if name == "staged":
            monkeypatch.setattr(state_writing, "_changes", lambda tensor, host: not host.holds(tensor))
        (tmp_path / name).mkdir()
        begin_saving(state, tmp_path / name).finish()
        sizes.append(state.host.size)
        contents.append({file.name: file.read_bytes() for file in (tmp_path / name).glob("*.distcp")})
    assert contents[0] == contents[1] == contents[2]
    parameters = sum(parameter.numel() for parameter in state.engine.model.parameters())
    assert sizes == [0, 12 * parameters, 12 * parameters]


@pytest.mark.parametrize(("size", "files"), [(1, 2), (2, 2), (3, 3), (4, 4), (9, 4)])
def test_larger_states_are_written_by_more_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int, files: int
) -> None:
    monkeypatch.setattr(state_writing, "_FILE_BYTES", 100)
    state = {str(k): ShardedTensor.from_rank_offsets(str(k), torch.zeros(size)) for k in range(25)}
    checksums = state_writing.begin_writing(state, tmp_path, HostMemory()).finish()
    assert len(checksums) == len(list(tmp_path.glob("*.distcp"))) == files
