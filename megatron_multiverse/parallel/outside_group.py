"""A process group with another program, beside torch's default one: a trainer sends its weights to a server over it.

Both sides may be this module. The other one may also be what trainers make for SGLang, a group of torch under a name of
its own over a TCP store (`init_custom_process_group`): the keys of the store are the same.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from datetime import timedelta
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, distributed
from torch._C._distributed_c10d import BroadcastOptions, PrefixStore, TCPStore
from torch.distributed.distributed_c10d import BackendConfig

from megatron_multiverse.errors import RankError

T = TypeVar("T")

GroupBackend = Literal["nccl", "gloo"]
_MARGIN_S = 10.0
"""How much longer than the library itself may wait for others the thread is waited for in which it does so."""
_TOLERANT_NCCL = {"TORCH_NCCL_ASYNC_ERROR_HANDLING": "0", "TORCH_NCCL_ENABLE_MONITORING": "0"}
"""Read where a group is made. By default torch ends the process whose collective failed; here the other side may fail
and this one goes on."""


class OutsideGroup:
    """This program's place in a group of several. Made on all of them at the same time.

    Args:
        address: host of rank 0, where the others find it.
        port: at which rank 0 listens for the others; free there.
        rank: this one's; 0 sends.
        size: of the group.
        name: of the group, the same for all.
        backend: nccl between GPUs, gloo between CPUs.
        seconds: after which those that have not come are given up.
        interface: of the network, for gloo; by default the one that this host's name resolves to. NCCL takes its own
            from NCCL_SOCKET_IFNAME.
        device: what nccl sends and receives from.

    Raises:
        RankError: the others did not come in time, or cannot be reached.
    """

    def __init__(
        self,
        address: str,
        port: int,
        *,
        rank: int,
        size: int,
        name: str = "weight_update_group",
        backend: GroupBackend = "nccl",
        seconds: float = 300.0,
        interface: str = "",
        device: torch.device | str = "cpu",
    ) -> None:
        self.name, self.backend, self.rank, self.size = name, backend, rank, size
        self._device = torch.device(device)
        limit = timedelta(seconds=seconds)

        def join() -> Any:
            store = TCPStore(address, port, size, is_master=rank == 0, timeout=limit)
            kind = next(iter(BackendConfig(distributed.Backend(backend)).get_device_backend_map()))
            inner = PrefixStore(f"{kind}/", PrefixStore(f"{name}/", PrefixStore(name, store)))
            return _gloo(inner, rank, size, limit, interface) if backend == "gloo" else _nccl(inner, rank, size, limit)

        try:
            self._group: Any = self._within(seconds, join)
        except Exception as error:
            raise RankError(
                f"rank {rank} of {size} did not meet the others of {name!r} at {address}, port {port}, within "
                f"{seconds:.0f} s ({type(error).__name__}): see that rank 0 makes the same group there and then, that "
                "all ranks come, and that they reach each other"
            ) from error

    def broadcast(self, tensor: Tensor, seconds: float) -> None:
        """Send a tensor from rank 0, or receive it there into this one, of the same shape and dtype; done on return.

        Args:
            tensor: contiguous; on the GPU for nccl, on the CPU for gloo.
            seconds: after which the others are given up.

        Raises:
            RankError: they did not take part in time, or have gone, or sent another number of bytes. The ranks may
                be out of step then: close the group.
        """
        options = BroadcastOptions()
        options.rootRank, options.rootTensor = 0, 0
        options.timeout = limit = timedelta(seconds=max(0.001, seconds))
        try:
            self._within(seconds, lambda: self._group.broadcast([tensor], options).wait(limit))
        except Exception as error:
            raise RankError(
                f"a tensor of {self.name!r} did not arrive whole within {seconds:.0f} s ({type(error).__name__}): the "
                "other side sent another one, was too late, or has gone"
            ) from error

    def close(self) -> None:
        """Leave. Those that wait for this rank are let go, where the library can tell them."""
        group, self._group = self._group, None
        with contextlib.suppress(Exception):
            group.abort()

    def _within(self, seconds: float, work: Callable[[], T]) -> T:
        """What `work` returns, in a thread: NCCL waits without limit for ranks that have never come."""
        future: Future[T] = Future()

        def run() -> None:
            try:
                if self._device.type == "cuda":
                    torch.cuda.set_device(self._device)  # a thread begins on the first GPU
                future.set_result(work())
            except BaseException as error:
                future.set_exception(error)

        threading.Thread(target=run, name="outside group", daemon=True).start()
        return future.result(seconds + _MARGIN_S)


def _gloo(store: PrefixStore, rank: int, size: int, limit: timedelta, interface: str) -> Any:
    gloo: Any = distributed.ProcessGroupGloo
    options = gloo._Options()
    options._devices = [gloo.create_device(interface=interface) if interface else gloo.create_default_device()]
    options._timeout = limit
    return gloo(store, rank, size, options)


def _nccl(store: PrefixStore, rank: int, size: int, limit: timedelta) -> Any:
    nccl = distributed.ProcessGroupNCCL
    options = nccl.Options()
    options._timeout = limit
    with _environment(_TOLERANT_NCCL):
        return nccl(store, rank, size, options)


@contextlib.contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """These variables in the block."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
