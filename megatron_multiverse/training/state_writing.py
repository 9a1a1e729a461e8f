"""Writes the tensors of a checkpoint from processes of its own, so that training can go on meanwhile.

megatron-core plans which rank writes what, and completes the checkpoint once all files are there. In between this
module takes the place of its own writers, which wait for ever where one of their processes is killed, and start a
server process that outlives a killed run (both in `findings/`). Here the rank forks a process for each file. It sees
memory as it was at the fork, whatever training changes afterwards, and tells through a pipe how it ended; the pipe of a
process that is killed is closed, too.
"""

from __future__ import annotations

import contextlib
import gc
import inspect
import logging
import multiprocessing
import queue
import signal
import warnings
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async
from torch import Tensor

from megatron_multiverse.checksums import checksum
from megatron_multiverse.model.cpu import device_neutral_cuda
from megatron_multiverse.training.signals import hold_signals

Bucket = tuple[str, str, tuple[list[Any], list[tuple[Any, Tensor]]]]
"""What megatron-core calls the content of one file: its path, its name, and (objects, tensors)."""

_FORK = multiprocessing.get_context("fork")
_END_S = 10.0
"""Seconds for a process to end; one that waits for a disk does not even when it is killed, and the run must."""


def begin_writing(state: dict[str, Any], folder: Path) -> StateWriting:
    """Begin to write the state of a run; it may change as soon as this returns. All ranks call it.

    Waits for the copy of tensors that lie on a GPU.

    Args:
        state: sharded tensors and plain values, for megatron-core's `dist_checkpointing`.
        folder: an existing one, the same on all ranks.

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
        return StateWriting(dist_checkpointing.save(state, str(folder), **options), results)


class StateWriting:
    """The state of a run on its way to the disk.

    Args:
        request: megatron-core's `AsyncRequest`: what this rank is to write, and how the checkpoint is completed.
        results: where megatron-core then looks for what was written.
    """

    def __init__(self, request: Any, results: queue.Queue[Any]) -> None:
        self._request, self._results = request, results
        buckets = request.async_fn_args[1] if request.async_fn_args else []
        # Kept until all is written: a copy from a GPU lies in pinned memory, which a forked process shares.
        self._staged = [_staged(bucket) for bucket in buckets]
        if any(tensor.is_cuda for _, _, (_, tensors) in buckets for _, tensor in tensors):
            torch.cuda.synchronize()
        transforms = request.async_fn.args[0] if buckets else None
        self._writers = [_Writer(transforms, number, bucket) for number, bucket in enumerate(self._staged)]

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
        failure = None
        try:
            for number, writer in enumerate(self._writers):
                written[number], checksums[writer.file.name] = writer.result()
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
        self._staged = []


def _staged(bucket: Bucket) -> Bucket:
    file, name, (objects, tensors) = bucket
    return file, name, (objects, [(item, _on_host(tensor)) for item, tensor in tensors])


def _on_host(tensor: Tensor) -> Tensor:
    """The tensor in memory of which a forked process sees the state at the fork."""
    if tensor.is_cuda:
        return tensor.to("cpu", non_blocking=True)
    is_shared: bool = tensor.is_shared()  # type: ignore[no-untyped-call]
    return tensor.clone() if is_shared or tensor.is_pinned() else tensor


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

    def result(self) -> tuple[Any, str]:
        """Wait for it. megatron-core's record of what stands where, and the checksum of the file.

        Raises:
            RuntimeError: the file could not be written.
        """
        try:
            outcome = self._outcome.recv()
        except (EOFError, OSError):  # nothing was sent, or not all of it
            self._process.join(_END_S)
            outcome = f"the process that writes {self.file.name} ended with exit code {self._process.exitcode}"
        if isinstance(outcome, str):
            raise RuntimeError(outcome)
        written, digest = outcome
        return written, str(digest)

    def kill(self) -> None:
        self._process.kill()
        self._process.join(_END_S)


def _write(outcome: Connection, transforms: Any, number: int, bucket: Bucket) -> None:
    """In the forked process: write the file, and tell what was written and its checksum, or what went wrong."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches this process, too; the run decides what it means
    gc.disable()  # it would free what belongs to the run on the GPU
    torch.set_num_threads(1)  # its threads were not forked
    results: queue.Queue[Any] = queue.Queue()
    unfinished: queue.Queue[int] = queue.Queue()
    unfinished.put(number)
    try:
        write = filesystem_async.FileSystemWriterAsync.write_preloaded_data
        write(transforms, number, bucket, results, unfinished, True)
        _, written = results.get_nowait()
        if isinstance(written, Exception):
            raise written
        outcome.send((written, checksum(Path(bucket[0]))))
    except Exception as error:
        outcome.send(f"{type(error).__name__}: {error}")


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
