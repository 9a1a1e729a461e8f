"""Large files hold what was written to them, on every file system, or the writer hears why not."""

from __future__ import annotations

import errno
import os
import random
from pathlib import Path

import pytest

from megatron_multiverse import large_files
from megatron_multiverse.checksums import checksum
from megatron_multiverse.large_files import LargeFile

PIECE = 8192
BYTES = random.Random(0).randbytes(5 * PIECE + 77)


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(large_files, "_PIECE", PIECE)


def write(file: Path, data: bytes, seed: int = 0) -> LargeFile:
    """Write data in parts of random lengths."""
    draw = random.Random(seed)
    with LargeFile(file) as stream:
        place = 0
        while place < len(data):
            part = memoryview(data)[place : place + draw.choice([0, 1, 100, PIECE - 1, PIECE, 3 * PIECE])]
            assert stream.tell() == place and stream.write(part) == len(part)
            place += len(part)
    return stream


@pytest.mark.parametrize("size", [0, 1, PIECE - 1, PIECE, PIECE + 1, 3 * PIECE, len(BYTES)])
def test_a_file_holds_what_was_written_and_knows_its_checksum(tmp_path: Path, size: int) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"old and longer" * PIECE)
    for seed in range(3):
        stream = write(file, BYTES[:size], seed)
        assert file.read_bytes() == BYTES[:size] and stream.checksum == checksum(file)


@pytest.mark.parametrize("refused_by", ["open", "write"])
def test_file_systems_without_direct_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused_by: str) -> None:
    """Some refuse to open a file so, others open it and refuse the first write."""
    real_open, real_write, direct = os.open, os.write, set[int]()

    def opened(path: str, flags: int, mode: int) -> int:
        if flags & os.O_DIRECT and refused_by == "open":
            raise OSError(errno.EINVAL, "Invalid argument")
        descriptor = real_open(path, flags & ~os.O_DIRECT, mode)
        if flags & os.O_DIRECT:
            direct.add(descriptor)
        return descriptor

    def written(descriptor: int, data: memoryview) -> int:
        if descriptor in direct:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real_write(descriptor, data)

    def through_cache(descriptor: int) -> bool:
        before = descriptor in direct
        direct.discard(descriptor)
        return before

    monkeypatch.setattr(os, "open", opened)
    monkeypatch.setattr(os, "write", written)
    monkeypatch.setattr(large_files, "_without_direct", through_cache)
    stream = write(tmp_path / "file", BYTES)
    assert (tmp_path / "file").read_bytes() == BYTES and stream.checksum == checksum(tmp_path / "file")


@pytest.mark.parametrize("good_writes", [0, 2, 5])
def test_a_full_disk_is_told_by_the_name_of_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, good_writes: int
) -> None:
    real, left = os.write, [good_writes]

    def full(descriptor: int, data: memoryview) -> int:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(descriptor, data)

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match=r"No space left on device: '.*full'") as caught:
        write(tmp_path / "full", BYTES)
    assert caught.value.errno == errno.ENOSPC


def test_an_error_of_the_caller_ends_the_thread_and_closes_the_file(tmp_path: Path) -> None:
    file = tmp_path / "file"
    with pytest.raises(KeyboardInterrupt), LargeFile(file) as stream:
        stream.write(BYTES)
        assert is_open(file)
        raise KeyboardInterrupt
    assert not is_open(file)


def is_open(file: Path) -> bool:
    """Whether this process has it open; what else it has open may change at any time."""
    return any(os.path.realpath(entry) == str(file.resolve()) for entry in Path("/proc/self/fd").iterdir())
