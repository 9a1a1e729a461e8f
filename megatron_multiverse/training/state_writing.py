"""Writes the tensors of a checkpoint from processes of its own, so that training can go on meanwhile.

megatron-core plans which rank writes what, and completes the checkpoint once all files are there. In between this
module takes the place of its own writers, which wait for ever where one of their processes is killed, and start a
server process that outlives a killed run (both in `findings/`). Here the rank forks a process for each file. It sees
memory as it was at the fork, whatever training changes afterwards, and tells through a pipe how it ended; the pipe of a
process that is killed is closed, too. What lies on a GPU is copied to kept memory before (host_memory.py).
"""

from __future__ import annotations

import contextlib
import gc
import inspect
import io
import logging
import multiprocessing
import queue
import signal
import time
import warnings
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import xxhash
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories, is_main_replica
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from torch import Tensor

from megatron_multiverse.checksums import checksum
from megatron_multiverse.model.cpu import device_neutral_cuda
from megatron_multiverse.training.host_memory import HostMemory
from megatron_multiverse.training.signals import hold_signals

logger = logging.getLogger(__name__)

Bucket = tuple[str, str, tuple[list[Any], list[tuple[Any, Tensor]]]]
"""What megatron-core calls the content of one file: its path, its name, and (objects, tensors)."""

_FORK = multiprocessing.get_context("fork")
_FILES, _FILE_BYTES = range(2, 4 + 1), 1 << 29
"""How many files a rank writes, and from how many bytes on it takes one more. Each is written by a process of its own,
which comes to about 1 GB/s, since torch.save works out a CRC32 of all that it writes."""
_QUIET_S = 60.0
"""Seconds that training waits for a file before it says so, and again: the disk may never answer."""
_END_S = 10.0
"""Seconds for a process to end; one that waits for a disk does not even when it is killed, and the run must."""


def begin_writing(state: dict[str, Any], folder: Path, host: HostMemory) -> StateWriting:
    """Begin to write the state of a run; it may change as soon as this returns. All ranks call it.

    Waits for the copy of tensors that lie on a GPU.

    Args:
        state: sharded tensors and plain values, for megatron-core's `dist_checkpointing`.
        folder: an existing one, the same on all ranks.
        host: where tensors are copied to that lie on a GPU; the state may have tensors of it.

    Raises:
        CheckpointException: megatron-core or torch could not do it. Not a subclass of Exception.
    """
    options: dict[str, Any] = {"async_sharded_save": True}
    if "async_strategy" in inspect.signature(dist_checkpointing.save).parameters:
        options["async_strategy"] = "mcore"  # the default needs another package
    # Otherwise megatron-core starts a server process to have such a queue, which outlives a SIGKILL.
    results: queue.Queue[Any] = queue.Queue()
    filesystem_async._results_queue = results
    with device_neutral_cuda(), quiet(), hold_signals():
        started = time.perf_counter()
        size = _give_own_storages(state, host)
        files = min(max(size // _FILE_BYTES, _FILES[0]), _FILES[-1])
        options["sharded_strategy"] = TorchDistSaveShardedStrategy("torch_dist", 1, thread_count=files)
        request = dist_checkpointing.save(state, str(folder), **options)
        writing = StateWriting(request, results, host)
        writing.seconds["plan_s"] = (
            time.perf_counter() - started - writing.seconds["copy_s"] - writing.seconds["fork_s"]
        )
        return writing


def _give_own_storages(state: dict[str, Any], host: HostMemory) -> int:
    """Let tensors on the host that are views, such as the halves of a gated MLP, have a storage of their own size in
    the same memory: torch.save writes whole storages, so that megatron-core would copy them first.

    Returns:
        Bytes of all tensors that this rank writes.
    """
    apply_factories(state)
    size = 0
    for value in nested_values(state):
        if isinstance(value, ShardedTensor) and is_main_replica(value.replica_id):
            size += value.data.numel() * value.data.itemsize
            if _is_plain(value.data, host):
                value.data = torch.from_numpy(value.data.detach().view(torch.uint8).numpy()).view(value.data.dtype)
    return size


def _is_plain(tensor: Tensor, host: HostMemory) -> bool:
    return tensor.is_cpu and tensor.dim() > 0 and tensor.is_contiguous() and not _changes(tensor, host)


class StateWriting:
    """The state of a run on its way to the disk.

    Args:
        request: megatron-core's `AsyncRequest`: what this rank is to write, and how the checkpoint is completed.
        results: where megatron-core then looks for what was written.
        host: where tensors are copied to that lie on a GPU.

    Attributes:
        seconds: of the phases on this rank, by their names in metrics.jsonl.
    """

    def __init__(self, request: Any, results: queue.Queue[Any], host: HostMemory) -> None:
        self._request, self._results = request, results
        self.seconds: dict[str, float] = {}
        buckets = request.async_fn_args[1] if request.async_fn_args else []
        started = time.perf_counter()
        staged = [_staged(bucket, host) for bucket in buckets]
        host.wait()
        self.seconds["copy_s"] = time.perf_counter() - started
        started = time.perf_counter()
        transforms = request.async_fn.args[0] if buckets else None
        self._writers = [_Writer(transforms, number, bucket) for number, bucket in enumerate(staged)]
        self.seconds["fork_s"] = time.perf_counter() - started

    def is_running(self) -> bool:
        """Whether a file of this rank is still being written."""
        return any(writer.is_running() for writer in self._writers)

    def finish(self) -> dict[str, str]:
        """Wait for the files of all ranks and complete the checkpoint. All ranks call it.

        Returns:
            Name of each file that this rank wrote -> its checksum.

        Raises:
            CheckpointException: a file could not be written, on all ranks; the first one knows why.
        """
        written: dict[int, Any] = {}
        checksums: dict[str, str] = {}
        self.seconds["write_s"] = 0.0
        failure = None
        try:
            for number, writer in enumerate(self._writers):
                written[number], checksums[writer.file.name], seconds = writer.result()
                self.seconds["write_s"] = max(self.seconds["write_s"], seconds)
        except RuntimeError as error:
            failure = error
        finally:
            self.abort()
        if self._writers:
            self._results.put(failure or written)
        with device_neutral_cuda(), quiet():
            for complete in self._request.finalize_fns:
                complete()
        return checksums

    def abort(self) -> None:
        """Kill what is still being written; what is there of it stays."""
        for writer in self._writers:
            writer.kill()


def _staged(bucket: Bucket, host: HostMemory) -> Bucket:
    file, name, (objects, tensors) = bucket
    staged = [(item, host.copy(tensor) if _changes(tensor, host) else tensor) for item, tensor in tensors]
    return file, name, (objects, staged)


def _changes(tensor: Tensor, host: HostMemory) -> bool:
    """Whether training changes what a forked process sees of a tensor: it cannot read a GPU, and shares some memory."""
    if not tensor.is_cpu:
        return True
    is_shared: bool = tensor.is_shared()  # type: ignore[no-untyped-call]
    return (is_shared or tensor.is_pinned()) and not host.holds(tensor)


class _Writer:
    """The process that writes one file."""

    def __init__(self, transforms: Any, number: int, bucket: Bucket) -> None:
        self.file = Path(bucket[0])
        self._outcome, theirs = _FORK.Pipe(duplex=False)
        self._process = _FORK.Process(target=_write, args=(theirs, transforms, number, bucket), daemon=True)
        self._process.start()
        theirs.close()  # so that only the process itself holds this end

    def is_running(self) -> bool:
        return not self._outcome.poll()

    def result(self) -> tuple[Any, str, float]:
        """Wait for it. megatron-core's record of what stands where, the checksum of the file, and seconds of writing.

        Raises:
            RuntimeError: the file could not be written.
        """
        started = time.monotonic()
        while not self._outcome.poll(_QUIET_S):
            logger.warning(
                "training has waited %.0f s for process %d, which writes %s (%.1f MiB are there)",
                time.monotonic() - started,
                self._process.pid,
                self.file,
                (self.file.stat().st_size if self.file.exists() else 0) / 2**20,
            )
        try:
            outcome = self._outcome.recv()
        except (EOFError, OSError):  # nothing was sent, or not all of it
            self._process.join(_END_S)
            outcome = f"the process that writes {self.file.name} ended with exit code {self._process.exitcode}"
        if isinstance(outcome, str):
            raise RuntimeError(outcome)
        written, digest, seconds = outcome
        return written, str(digest), float(seconds)

    def kill(self) -> None:
        self._process.kill()
        self._process.join(_END_S)


def _write(outcome: Connection, transforms: Any, number: int, bucket: Bucket) -> None:
    """In the forked process: write the file, and tell what was written and its checksum, or what went wrong."""
    started = time.perf_counter()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches this process, too; the run decides what it means
    gc.disable()  # it would free what belongs to the run on the GPU
    torch.set_num_threads(1)  # its threads were not forked
    results: queue.Queue[Any] = queue.Queue()
    unfinished: queue.Queue[int] = queue.Queue()
    unfinished.put(number)
    opened: list[_HashedFile] = []
    # The module has no such name; its functions look there before they take Python's own.
    filesystem_async.open = lambda file, mode: _HashedFile.among(opened, file, mode)
    try:
        write = filesystem_async.FileSystemWriterAsync.write_preloaded_data
        write(transforms, number, bucket, results, unfinished, True)
        _, written = results.get_nowait()
        if isinstance(written, Exception):
            raise written
        digest = opened[0].digest.hexdigest() if len(opened) == 1 else checksum(Path(bucket[0]))
        outcome.send((written, digest, time.perf_counter() - started))
    except Exception as error:
        outcome.send(f"{type(error).__name__}: {error}")


class _HashedFile(io.BufferedWriter):
    """A file whose checksum is worked out while it is written, from first to last: reading it again took as long as
    writing it."""

    digest: xxhash.xxh3_64

    @classmethod
    def among(cls, opened: list[_HashedFile], file: str, mode: str) -> _HashedFile:
        found = cls(io.FileIO(file, mode))
        found.digest = xxhash.xxh3_64()
        opened.append(found)
        return found

    def write(self, data: Any, /) -> int:
        self.digest.update(data)
        return super().write(data)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence torch's FutureWarnings about parts of it that megatron-core still uses, and two warnings of its own: that
    a folder is not empty (the run's description lies in it), and that its writers will go (they are not used).
    """
    names = ("serialization", "strategies.torch")
    loggers = [logging.getLogger(f"megatron.core.dist_checkpointing.{name}") for name in names]
    levels = [found.level for found in loggers]
    for found in loggers:
        found.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        for found, level in zip(loggers, levels, strict=True):
            found.setLevel(level)
