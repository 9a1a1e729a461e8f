"""The ranks of a run: how they find each other, agree, and end together.

What is said here goes over the host (gloo), so nothing waits for a GPU. With one rank everything is trivial and no
process group is made.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import distributed
from torch._C._distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from megatron_multiverse.errors import ConfigError, MultiverseError, RankError

T = TypeVar("T")

_POLL_S = 0.5
"""Seconds between two looks at whether another rank has failed."""
_GRACE_S = 5.0
"""Seconds in which a rank may end by its own error after another one has failed."""


class Ranks:
    """This rank among all ranks of the run.

    All methods are collective: every rank calls them in the same order.
    """

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size = rank, size

    @property
    def is_first(self) -> bool:
        """Whether this rank speaks for all: it writes logs, metrics and what lies beside the checkpoints' tensors."""
        return self.rank == 0

    def sum(self, numbers: Sequence[int]) -> list[int]:
        """Element-wise sums over the ranks."""
        if self.size == 1:
            return list(numbers)
        total = torch.tensor(numbers, dtype=torch.int64)
        distributed.all_reduce(total)
        return [int(number) for number in total]

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank."""
        return self.sum([int(flag)])[0] > 0

    def gather(self, value: T) -> list[T]:
        """The value of every rank, in their order. Small values: they are pickled."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        distributed.all_gather_object(values, value)
        return values

    def gather_to_first(self, value: T) -> list[T]:
        """The value of every rank, in their order, on the first rank; an empty list on the others."""
        if self.size == 1:
            return [value]
        values: list[Any] | None = [None] * self.size if self.is_first else None
        distributed.gather_object(value, values)
        return values or []

    def first(self, function: Callable[[], T]) -> T:
        """What `function` returns on the first rank, where alone it runs.

        Raises:
            MultiverseError: what it raised there, on every rank. Any other error is raised there, and as a RankError on
                the other ranks.
        """
        if self.size == 1:
            return function()
        outcome: list[Any] = [None, None]
        failure: Exception | None = None
        if self.is_first:
            try:
                outcome[0] = function()
            except Exception as error:
                known = isinstance(error, MultiverseError)
                outcome[1] = error if known else RankError(f"rank 0 failed: {type(error).__name__}: {error}")
                failure = error
        distributed.broadcast_object_list(outcome)
        if failure is not None:
            raise failure
        if outcome[1] is not None:
            raise outcome[1]
        result: T = outcome[0]
        return result

    def check_same(self, what: str, value: Any, remedy: str) -> None:
        """Raise ConfigError on every rank if they do not all have the same value.

        Args:
            what: name of the value, for the message.
            value: anything that has an equality and a text.
            remedy: what to do.
        """
        values = self.gather(value)
        for rank, other in enumerate(values):
            if other != values[0]:
                raise ConfigError(f"{what} is {values[0]} on rank 0 and {other} on rank {rank}: {remedy}")


def current_ranks() -> Ranks:
    """The ranks of torch's process group, or this one alone if there is none."""
    if not distributed.is_initialized():
        return Ranks()
    return Ranks(distributed.get_rank(), distributed.get_world_size())


@contextlib.contextmanager
def joined_ranks(
    world_size: int, *, timeout: timedelta = timedelta(minutes=30), rendezvous_url: str = "env://"
) -> Iterator[Ranks]:
    """The ranks that torchrun (or srun with RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT) started.

    Where an error leaves the block on one rank the others end, too: within seconds, and after that rank has said why.
    Process groups that exist already are used as they are.

    Args:
        world_size: number of ranks.
        timeout: how long a collective may take before it is an error.
        rendezvous_url: where they meet. file:///PATH needs no port, which torch's store would open to other machines;
            the ranks must be on one machine then, and need RANK and LOCAL_RANK alone.

    Raises:
        ConfigError: the environment does not say which rank this is, or there are fewer GPUs than ranks on this host.
    """
    if world_size == 1:
        yield Ranks()
    elif distributed.is_initialized():
        yield current_ranks()
    else:
        store, rank = _connect(timeout, rendezvous_url, world_size)
        if rank != 0:  # the first rank says for all what all would say
            logging.getLogger("megatron_multiverse").setLevel(logging.ERROR)
        with _ending_together(PrefixStore("failures", store), rank):
            backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
            groups = PrefixStore("groups", store)
            distributed.init_process_group(backend, store=groups, rank=rank, world_size=world_size, timeout=timeout)
            ranks = Ranks(rank, world_size)
            yield ranks
            ranks.any(False)  # nobody leaves while another one still needs it
        distributed.destroy_process_group()


def _connect(timeout: timedelta, url: str, world_size: int) -> tuple[Any, int]:
    """The store over which the ranks meet, and the number of this rank. Chooses its GPU."""
    needed = ("RANK", "LOCAL_RANK", *(("MASTER_ADDR", "MASTER_PORT") if url == "env://" else ()))
    missing = [name for name in needed if name not in os.environ]
    if missing:
        raise ConfigError(
            f"there are {world_size} ranks, but {', '.join(missing)} not set: start with torchrun, or set "
            "them for each rank"
        )
    local = int(os.environ["LOCAL_RANK"])
    # One hardware queue: otherwise kernels may overtake the communication that is meant to run beside them.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    if torch.cuda.is_available():
        if local >= torch.cuda.device_count():
            raise ConfigError(
                f"LOCAL_RANK is {local}, but this host has {torch.cuda.device_count()} GPUs: start one rank per GPU "
                "(torchrun --nproc-per-node)"
            )
        torch.cuda.set_device(local)
    rank = int(os.environ["RANK"])
    store, _, _ = next(rendezvous(url, rank, world_size, timeout=timeout))
    # torchrun --max-restarts starts new processes beside the same store, in which the dead ones left their addresses.
    return PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store), rank


@contextlib.contextmanager
def _ending_together(store: Any, rank: int) -> Iterator[None]:
    """An error in the block on any rank ends the processes of all."""
    done = threading.Event()
    watch = threading.Thread(target=_watch, args=(store.clone(), rank, done), name="failure watch", daemon=True)
    watch.start()
    try:
        yield
    except BaseException as error:
        done.set()
        if not isinstance(error, MultiverseError | SystemExit | KeyboardInterrupt):
            traceback.print_exc()  # before the others speak; run_tool shows one line only
            sys.stderr.flush()
        with contextlib.suppress(Exception):
            store.compare_set("failed", "", f"rank {rank}: {type(error).__name__}: {error}")
        raise
    finally:
        done.set()
        watch.join()


def _watch(store: Any, rank: int, done: threading.Event) -> None:
    """End this process when another rank has failed. The main thread may wait for that rank in a collective, which
    cannot be interrupted."""
    while not done.wait(_POLL_S):
        try:
            failure = store.get("failed").decode() if store.check(["failed"]) else None
        except Exception as error:  # the store lives in the first rank or in the launcher: that one is gone
            failure = f"the ranks' store is gone ({type(error).__name__})"
        if failure is not None:
            if done.wait(_GRACE_S):
                return
            print(f"rank {rank} ends, because another one failed: {failure}", file=sys.stderr, flush=True)
            os._exit(1)
