"""Processes that keep and check answers, so that the one that asks has the next request on the wire at once."""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import os
import pickle
import signal
import socket
import struct
import traceback
import zlib
from collections import deque
from multiprocessing.process import BaseProcess
from typing import Any

from megatron_multiverse.child_processes import end_with_parent
from megatron_multiverse.curation.conversation import Conversation
from megatron_multiverse.curation.desk import Desk, Turn
from megatron_multiverse.curation.exchange import Answer, Failure
from megatron_multiverse.curation.inputs import Sample
from megatron_multiverse.errors import DataError

_SIZE = struct.Struct("<Q")
_STREAM_LIMIT = 1 << 22


class Talks:
    """The samples that are under way at one desk, by name."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk
        self._open: dict[str, Conversation] = {}

    def begin(self, sample: Sample) -> Turn:
        """See `Checkers.begin`."""
        self._open[sample.name] = self._desk.open(sample)
        return self._turn(sample.name)

    def hear(self, name: str, answer: Answer | Failure) -> Turn:
        """See `Checkers.hear`."""
        self._desk.tell(self._open[name], answer)
        return self._turn(name)

    def _turn(self, name: str) -> Turn:
        turn = self._desk.turn(self._open[name])
        if turn.request is None:
            del self._open[name]
        return turn


class Checkers:
    """The desk of a run in processes of its own, or here. A sample stays with one process.

    Enter it before anything has started a thread: the processes are forked. Not threads, because checking is Python
    code, and math-verify bounds its time by an alarm that only a main thread gets.

    Args:
        desk: what they do.
        count: number of processes; 0 does all of it in the calling one.
    """

    def __init__(self, desk: Desk, count: int) -> None:
        self._here = Talks(desk)
        self._count = count
        self._processes: list[_Process] = []

    def __enter__(self) -> Checkers:
        for _ in range(self._count):
            self._processes.append(_Process(self._here))
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.end()

    async def begin(self, sample: Sample) -> Turn:
        """Take a sample up.

        Raises:
            OSError: what is to be kept cannot be written.
            DataError: the process was killed.
        """
        return await self._call(sample.name, "begin", sample)

    async def hear(self, name: str, answer: Answer | Failure) -> Turn:
        """Keep and check the answer to the open question of a sample; raises as `begin` does."""
        return await self._call(name, "hear", name, answer)

    async def _call(self, sample: str, method: str, *arguments: Any) -> Turn:
        if not self._processes:
            turn: Turn = getattr(self._here, method)(*arguments)
            return turn
        return await self._processes[zlib.crc32(sample.encode()) % self._count].call(method, arguments)


class _Process:
    """One process, and the calls that it has not answered yet: it answers them in their order."""

    def __init__(self, talks: Talks) -> None:
        self._socket, theirs = socket.socketpair()
        # Forked, so the tokenizer that the rules hold is shared and need not be picklable.
        self._process: BaseProcess = multiprocessing.get_context("fork").Process(
            target=_serve, args=(talks, self._socket, theirs, os.getpid()), daemon=True
        )
        self._process.start()
        theirs.close()
        self._waiting: deque[asyncio.Future[Turn]] = deque()
        self._writer: asyncio.StreamWriter | None = None
        self._reading: asyncio.Task[None] | None = None
        self._connecting = asyncio.Lock()
        self._gone: DataError | None = None

    async def call(self, method: str, arguments: tuple[Any, ...]) -> Turn:
        writer = await self._connected()
        if self._gone is not None:
            raise self._gone
        future: asyncio.Future[Turn] = asyncio.get_running_loop().create_future()
        self._waiting.append(future)
        data = pickle.dumps((method, arguments), pickle.HIGHEST_PROTOCOL)
        writer.write(_SIZE.pack(len(data)) + data)
        return await future

    def end(self) -> None:
        """Let it finish what it is at, and wait for its end."""
        self._socket.shutdown(socket.SHUT_RDWR)  # closing is not enough: processes forked later hold it, too
        self._socket.close()
        self._process.join()

    async def _connected(self) -> asyncio.StreamWriter:
        async with self._connecting:
            if self._writer is None:
                reader, self._writer = await asyncio.open_connection(sock=self._socket.dup(), limit=_STREAM_LIMIT)
                self._reading = asyncio.create_task(self._read(reader))  # the loop itself holds tasks only weakly
        return self._writer

    async def _read(self, reader: asyncio.StreamReader) -> None:
        try:
            while True:
                (size,) = _SIZE.unpack(await reader.readexactly(_SIZE.size))
                turn, error = pickle.loads(await reader.readexactly(size))
                future = self._waiting.popleft()
                if future.cancelled():
                    continue
                if error is None:
                    future.set_result(turn)
                else:
                    future.set_exception(error)
        except (asyncio.IncompleteReadError, ConnectionError):
            self._gone = DataError(
                "a process that checks answers was killed (out of memory?); what it had kept is kept: run the same "
                "command again to go on, with fewer --workers if memory is short"
            )
            for future in self._waiting:
                if not future.done():
                    future.set_exception(self._gone)


def _serve(talks: Talks, theirs: socket.socket, own: socket.socket, parent: int) -> None:
    end_with_parent(parent)
    theirs.close()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # they reach the parent, too, which ends this process when it has to
    with contextlib.suppress(ConnectionError), own, own.makefile("rwb") as stream:
        while len(head := stream.read(_SIZE.size)) == _SIZE.size:
            method, arguments = pickle.loads(stream.read(*_SIZE.unpack(head)))
            data = pickle.dumps(_called(talks, method, arguments), pickle.HIGHEST_PROTOCOL)
            stream.write(_SIZE.pack(len(data)) + data)
            stream.flush()


def _called(talks: Talks, method: str, arguments: tuple[Any, ...]) -> tuple[Turn | None, Exception | None]:
    try:
        return getattr(talks, method)(*arguments), None
    except OSError as error:
        return None, error
    except Exception as error:
        # Some exceptions cannot be pickled, and none keeps its traceback.
        return None, RuntimeError(f"{type(error).__name__}: {error}\n{traceback.format_exc()}")
