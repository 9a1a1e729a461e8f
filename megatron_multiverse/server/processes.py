"""The processes of an engine: started, waited for, killed."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator

from megatron_multiverse.server.wire import Message, pack

logger = logging.getLogger(__name__)


class EngineProcesses:
    """One process for each rank of an engine, on this machine."""

    def __init__(self) -> None:
        self._processes: list[subprocess.Popen[bytes]] = []

    @contextlib.contextmanager
    def started(self, count: int, message: Message) -> Iterator[list[socket.socket]]:
        """Start them.

        Args:
            count: of ranks.
            message: the first one, for each; where they meet, if there are several, is added to it.

        Yields:
            This end of the connection to each, in the order of ranks.
        """
        if count == 1:  # meets nobody, and needs no folder, which would stay where this process is killed
            yield [self._start(0, 1, message | {"rendezvous_url": ""})]
            return
        with tempfile.TemporaryDirectory(prefix="multiverse-engine-") as folder:
            message = message | {"rendezvous_url": f"file://{folder}/ranks"}
            yield [self._start(rank, count, message) for rank in range(count)]

    def _start(self, rank: int, count: int, message: Message) -> socket.socket:
        own, theirs = socket.socketpair()
        command = [sys.executable, "-m", "megatron_multiverse.server.engine_process", str(theirs.fileno())]
        # Whatever started this process, torchrun or srun, the engine's ranks are no part of that.
        environment = os.environ | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
        # They talk within this machine; host names need not resolve. But NCCL has one interface for all it does, and a
        # trainer may be on another machine.
        environment.setdefault("GLOO_SOCKET_IFNAME", "lo")
        environment.setdefault("NCCL_SOCKET_IFNAME", message.get("weights_interface") or "lo")
        with theirs:
            self._processes.append(
                subprocess.Popen(command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, env=environment)
            )
        own.sendall(pack(message))
        return own

    @property
    def codes(self) -> list[int | None]:
        """Exit code of each; None while it runs."""
        return [process.poll() for process in self._processes]

    def wait(self, seconds: float) -> None:
        """Wait until all have ended; those that have not by then are killed."""
        limit = time.monotonic() + seconds
        for process in self._processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=max(0.0, limit - time.monotonic()))
        if None in self.codes:
            logger.warning("the engine did not end within %.0f s and is killed", seconds)
        self.kill()

    def kill(self) -> None:
        """End those that still run."""
        for process in self._processes:
            if process.poll() is None:
                process.kill()
                process.wait()
