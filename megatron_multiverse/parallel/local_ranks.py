"""Runs a function on several gloo ranks, all processes of this machine: for checks and tests, not for training."""

from __future__ import annotations

import datetime
import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext
from typing import Any

import torch

from megatron_multiverse.errors import RankError

_LATER_S = 60.0
"""How much later than the caller a rank gives up waiting for the others, so that the caller's error is the one told."""
# Importing these takes seconds: it is done once, in the process that the ranks are forked from.
_PRELOAD = [
    "megatron_multiverse.model.gpt",
    "megatron_multiverse.training.trainer",
    "megatron_multiverse.training.data",
    "torch._dynamo",
    "tokenizers",
]


def forking_context() -> ForkServerContext:
    """How ranks are started: forked from a process of one thread, with megatron-core and training imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    return context


def run_ranks(function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 900.0) -> list[Any]:
    """Call `function(*args)` on `world_size` ranks that share a gloo process group.

    Args:
        function: a top-level function; what it returns must pickle.
        world_size: number of processes.
        args: the same for every rank.
        timeout: seconds for all of it.

    Returns:
        What each rank returned, in the order of ranks.

    Raises:
        RankError: a rank raised (with its traceback), died, or time is up; the others are ended first.
    """
    context = forking_context()
    with tempfile.TemporaryDirectory(prefix="multiverse-ranks-") as folder:
        pipes, processes = [], []
        for rank in range(world_size):
            reader, writer = context.Pipe(duplex=False)
            options = (function, rank, world_size, f"{folder}/rendezvous", timeout, writer, args)
            process = context.Process(target=_rank, args=options)  # no daemon: saving starts processes of its own
            process.start()
            writer.close()
            pipes.append(reader)
            processes.append(process)
        try:
            return _collect(pipes, timeout)
        finally:
            for process in processes:
                process.join(timeout=2)  # after an error the others may wait for the one that failed
                if process.is_alive():
                    process.kill()
                    process.join()


def _collect(pipes: list[Connection], timeout: float) -> list[Any]:
    results: dict[Connection, Any] = {}
    deadline = time.monotonic() + timeout
    while len(results) < len(pipes):
        ready = wait([pipe for pipe in pipes if pipe not in results], max(0.0, deadline - time.monotonic()))
        if not ready:
            missing = [rank for rank, pipe in enumerate(pipes) if pipe not in results]
            raise RankError(f"ranks {missing} of {len(pipes)} did not finish within {timeout:.0f} s")
        failures = []
        for pipe in ready:
            assert isinstance(pipe, Connection)
            rank = pipes.index(pipe)
            try:
                when, failure, results[pipe] = pickle.loads(pipe.recv_bytes())
            except EOFError:
                when, failure = 0.0, "died without an error message: out of memory?"
            if failure is not None:
                failures.append((when, f"rank {rank} of {len(pipes)} {failure}"))
        if failures:
            # A rank that fails takes its connections with it, so others fail after it: the first one is the cause.
            raise RankError(min(failures)[1])
    return [results[pipe] for pipe in pipes]


def _rank(
    function: Callable[..., Any],
    rank: int,
    world_size: int,
    rendezvous: str,
    timeout: float,
    writer: Connection,
    args: tuple[Any, ...],
) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = os.environ.get("GLOO_SOCKET_IFNAME", "lo")  # host names need not resolve
    # megatron-core warns of settings that slow training down; nothing is trained here.
    warnings.filterwarnings("ignore", message="When using async grad allreduce")
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // world_size))
    try:
        torch.distributed.init_process_group(
            "gloo",
            init_method=f"file://{rendezvous}",
            rank=rank,
            world_size=world_size,
            timeout=datetime.timedelta(seconds=timeout + _LATER_S),
        )
        result = function(*args)
    except Exception:
        writer.send_bytes(pickle.dumps((time.monotonic(), f"failed:\n{traceback.format_exc()}", None)))
        # At once: destroying the process group would wait for ranks that wait for this one.
        os._exit(1)
    # Not `send`: it would pass tensors as handles into the memory of this process, which is about to end.
    writer.send_bytes(pickle.dumps((time.monotonic(), None, result)))
    writer.close()
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
