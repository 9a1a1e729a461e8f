"""Memory that checkpoints are copied to: what it holds, that it is kept, and who sees it."""

from __future__ import annotations

import gc
import logging
import mmap
import os
from types import SimpleNamespace

import pytest
import torch

from megatron_multiverse.training.host_memory import HostMemory

CPU = torch.device("cpu")


def sources() -> list[torch.Tensor]:
    torch.manual_seed(0)
    table = torch.randn(6, 8)
    halves = list(table.chunk(2))
    return [table, *halves, table.t(), table.bfloat16(), torch.tensor(3.0), torch.tensor([True, False]), table[:0]]


def test_copies_are_equal_and_have_storages_of_their_own_size() -> None:
    host = HostMemory()
    copies = [host.copy(tensor) for tensor in sources()]
    host.wait()
    for copy, source in zip(copies, sources(), strict=True):
        assert torch.equal(copy, source) and copy.dtype == source.dtype and copy.is_contiguous()
        assert copy.untyped_storage().size() == copy.numel() * copy.itemsize
    assert host.size == sum(tensor.numel() * tensor.itemsize for tensor in sources())


def test_memory_is_kept_in_whatever_order_it_is_asked_for() -> None:
    host = HostMemory()
    first = [host.copy(tensor).data_ptr() for tensor in sources()[:4]]
    size = host.size
    host.reuse()
    again = [host.copy(tensor) for tensor in reversed(sources()[:4])]
    assert {tensor.data_ptr() for tensor in again} == set(first) and host.size == size
    assert all(torch.equal(*pair) for pair in zip(again, reversed(sources()[:4]), strict=True))
    further = host.copy(sources()[0])
    assert further.data_ptr() not in first and host.size == size + further.numel() * further.itemsize


def test_it_knows_what_lies_in_it() -> None:
    host = HostMemory()
    copy = host.copy(torch.randn(4, 4))
    assert host.holds(copy) and host.holds(copy[3:]) and not host.holds(torch.randn(4, 4))
    assert not HostMemory().holds(copy)


def test_a_forked_process_writes_into_the_same_memory() -> None:
    copy = HostMemory().copy(torch.zeros(1000))
    if (child := os.fork()) == 0:
        copy.fill_(7)
        os._exit(0)
    os.waitpid(child, 0)
    assert torch.equal(copy, torch.full((1000,), 7.0))


class Runtime:
    """Stands in for CUDA's runtime; `error` is what it answers."""

    def __init__(self, error: int) -> None:
        self.error, self.pinned, self.asked = error, dict[int, int](), 0

    def cudaHostRegister(self, start: int, size: int, flags: int) -> int:
        self.asked += 1
        if self.error == 0:
            self.pinned[start] = size
        return self.error

    def cudaHostUnregister(self, start: int) -> int:
        del self.pinned[start]
        return 0


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Runtime:
    found = Runtime(request.param)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: found)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch, "zeros", lambda *args, **kwargs: SimpleNamespace())
    return found


@pytest.mark.parametrize("runtime", [0], indirect=True)
def test_memory_for_copies_from_a_gpu_is_pinned_once_and_until_it_is_given_back(runtime: Runtime) -> None:
    host = HostMemory()
    host.empty((8,), torch.float32, CPU)
    assert not runtime.pinned
    host.reuse()
    for _ in range(2):
        pinned = [host.empty((count,), torch.float32, torch.device("cuda")) for count in (16, 16, 5)]
        host.reuse()
    assert runtime.pinned == {tensor.data_ptr(): mmap.PAGESIZE for tensor in pinned}
    del host
    gc.collect()
    assert not runtime.pinned


@pytest.mark.parametrize("runtime", [2], indirect=True)
def test_memory_that_cannot_be_pinned_is_used_all_the_same_and_said_once(
    runtime: Runtime, caplog: pytest.LogCaptureFixture
) -> None:
    host = HostMemory()
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            host.empty((16,), torch.float32, torch.device("cuda")).fill_(1)
    (line,) = caplog.messages
    assert "cannot be pinned (CUDA error 2 for 64 bytes)" in line and runtime.asked == 1
