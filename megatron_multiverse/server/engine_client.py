"""The HTTP side of the engine process: starts it, hands it work, hears what it writes, notices when it dies."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import logging
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from megatron_multiverse.config import SamplingParams
from megatron_multiverse.inference.text.result import Result
from megatron_multiverse.server.config import ServerConfig
from megatron_multiverse.server.errors import ApiError, unavailable
from megatron_multiverse.server.results import result_from_dict
from megatron_multiverse.server.wire import HEADER, Message, pack, unpack

logger = logging.getLogger(__name__)

SECONDS_TO_END = 5.0
"""For processes that were told to."""
SECONDS_TO_EXPLAIN = 5.0
"""For the first rank to say why the engine does not start, after another rank has ended for the same reason."""

Write = tuple[str, list[int]]
"""Name of a branch, and what it wrote."""


@dataclasses.dataclass(eq=False)
class Generation:
    """One answer in the making."""

    number: int
    batch: Batch
    started: float
    writes: list[Write] = dataclasses.field(default_factory=list)
    """What was written and nobody has taken yet; only of streams."""
    accepted: bool = False
    """Whether the engine has taken it."""
    result: Result | None = None
    """The answer, once it is complete."""
    is_told: bool = False
    """Whether `Batch.news` has given the result."""


class Batch:
    """The answers that one HTTP request asks for.

    Args:
        client: where they are made.
        deadline: seconds until they are cancelled; they end with finish_reason "abort" then.
    """

    def __init__(self, client: EngineClient, deadline: float) -> None:
        self.generations: list[Generation] = []
        self._client = client
        self._changed = asyncio.Event()
        self._error: ApiError | None = None
        self._timer = asyncio.get_running_loop().call_later(deadline, self.cancel)

    async def accepted(self) -> None:
        """Wait until the engine has taken all of them.

        Raises:
            ApiError: it refused one, or died; the others are cancelled.
        """
        while not all(generation.accepted for generation in self.generations):
            await self._news()

    async def results(self) -> list[Result]:
        """All answers, complete.

        Raises:
            ApiError: the engine died.
        """
        while not self.is_complete:
            await self._news()
        return [generation.result for generation in self.generations if generation.result is not None]

    async def news(self, timeout: float) -> list[tuple[int, list[Write], Result | None]]:
        """What happened since the last call: (index, what was written, the answer if it is now complete) for each
        answer that has news; nothing after `timeout` seconds without any.

        Raises:
            ApiError: the engine died.
        """
        found = self._take_news()
        if not found:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(timeout):
                    await self._news()
            found = self._take_news()
        return found

    def _take_news(self) -> list[tuple[int, list[Write], Result | None]]:
        found = []
        for index, generation in enumerate(self.generations):
            writes, generation.writes = generation.writes, []
            result = None if generation.is_told else generation.result
            generation.is_told = generation.result is not None
            if writes or result is not None:
                found.append((index, writes, result))
        return found

    @property
    def is_complete(self) -> bool:
        """Whether all answers are."""
        return all(generation.result is not None for generation in self.generations)

    def cancel(self) -> None:
        """End all that go on, with all their branches, in the engine's next step."""
        self._timer.cancel()
        self._client.cancel(generation.number for generation in self.generations)

    def tell(self, error: ApiError | None = None) -> None:
        """There is news."""
        if error is not None and self._error is None:
            self._error = error
            self.cancel()
        if self.is_complete:
            self._timer.cancel()
        self._changed.set()

    async def _news(self) -> None:
        await self._changed.wait()
        self._changed.clear()
        if self._error is not None:
            raise self._error


class EngineClient:
    """Starts an engine process and talks to it. All methods belong to one event loop.

    Attributes:
        state: "loading", "ready" or "dead".
        facts: sizes of the engine (`max_position`, `num_pages`, `page_size`, `max_rows`), once ready.
        stats: what the engine last said of itself.
    """

    def __init__(self, config: ServerConfig) -> None:
        self.config = config
        self.state = "loading"
        self.facts: dict[str, Any] = {}
        self.stats: dict[str, Any] = {}
        self.failure = ""
        """Why the engine could not start."""
        self.processes: list[subprocess.Popen[bytes]] = []
        """Of the engine, one for each rank."""
        self.on_result: Callable[[Result, float], None] | None = None
        """Called with every complete answer and the seconds since it was asked for."""
        self._generations: dict[int, Generation] = {}
        self._numbers = itertools.count()
        self._writer: asyncio.StreamWriter | None = None
        self._last_heard = time.monotonic()
        self._seconds: deque[float] = deque(maxlen=64)  # how long the last answers took
        self._settled = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()

    async def run(self) -> None:
        """Start the engine's processes and listen to them until one ends."""
        with tempfile.TemporaryDirectory(prefix="multiverse-engine-") as folder:
            message = self._start_message() | {"rendezvous_url": f"file://{folder}/ranks"}
            first, *others = [self._spawn(rank, message) for rank in range(self.config.num_ranks)]
            await self.listen(first, others)

    def _spawn(self, rank: int, message: Message) -> socket.socket:
        """Start the process of a rank; returns this end of its connection."""
        own, theirs = socket.socketpair()
        command = [sys.executable, "-m", "megatron_multiverse.server.engine_process", str(theirs.fileno())]
        environment = dict(os.environ)
        if self.config.num_ranks > 1:
            environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(self.config.num_ranks)}
            for library in ("GLOO", "NCCL"):  # they talk within this machine; host names need not resolve
                environment.setdefault(f"{library}_SOCKET_IFNAME", "lo")
        else:
            environment["WORLD_SIZE"] = "1"  # whatever started this process, the engine is no part of it
        with theirs:
            process = subprocess.Popen(command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, env=environment)
        self.processes.append(process)
        own.sendall(pack(message))
        return own

    async def listen(self, connection: socket.socket, others: Sequence[socket.socket] = ()) -> None:
        """Listen to an engine host at the other end of a connection until it, or another rank, ends.

        Args:
            connection: to the first rank.
            others: to the other ranks, which say nothing; that they close tells that a rank has ended.
        """
        reader, self._writer = await asyncio.open_connection(sock=connection)
        tasks = [asyncio.create_task(self._read(reader)), *(asyncio.create_task(self._watch(own)) for own in others)]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            for task in tasks:
                task.cancel()
            self._die()

    async def _read(self, reader: asyncio.StreamReader) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                (length,) = HEADER.unpack(await reader.readexactly(HEADER.size))
                self._handle(unpack(await reader.readexactly(length)))

    async def _watch(self, connection: socket.socket) -> None:
        """Return when the rank at the other end has ended."""
        reader, writer = await asyncio.open_connection(sock=connection)
        with contextlib.closing(writer), contextlib.suppress(ConnectionError):
            await reader.read()
        if self._writer is not None and self._writer.is_closing():
            await asyncio.sleep(SECONDS_TO_END)  # they all end; the first one is waited for
        elif self.state == "loading":
            await asyncio.sleep(SECONDS_TO_EXPLAIN)

    def _start_message(self) -> Message:
        config = self.config
        return {
            "op": "start",
            "load": str(config.load),
            "tokenizer_type": config.tokenizer_type,
            "tokenizer_model": config.tokenizer_model or str(config.load),
            "engine": dataclasses.asdict(config.engine),
            "dtype": config.dtype,
            "device": config.device,
            "parallel_sizes": [config.tensor_model_parallel_size, config.pipeline_model_parallel_size],
            "log_level": config.log_level,
        }

    def close(self) -> None:
        """Let the engine's processes end, and see to it that they do."""
        if self._writer is not None:
            self._writer.close()
        limit = time.monotonic() + SECONDS_TO_END
        for process in self.processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=max(0.0, limit - time.monotonic()))
        self._kill()

    def _kill(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.kill()
                process.wait()

    @property
    def num_generations(self) -> int:
        """Answers in the making, waiting ones included."""
        return len(self._generations)

    @property
    def condition(self) -> str:
        """`state`, or "stalled" if a ready engine has given no sign of life for too long."""
        silent = time.monotonic() - self._last_heard
        return "stalled" if self.state == "ready" and silent > self.config.limits.engine_timeout else self.state

    async def settle(self) -> None:
        """Wait until the engine is ready or dead."""
        await self._settled.wait()

    async def idle(self) -> None:
        """Wait until no answer is in the making."""
        await self._idle.wait()

    def cancel_all(self) -> None:
        """End every answer that is in the making."""
        self.cancel(list(self._generations))

    def check_room(self, count: int) -> None:
        """Refuse `count` more answers where they cannot be taken.

        Raises:
            ApiError: 503 where the engine is not ready, 429 where the queue is full.
        """
        if self.condition != "ready":
            raise unavailable(self.condition)
        limit = self.config.limits.max_queued
        if len(self._generations) + count > limit:
            raise ApiError(
                429,
                f"the queue is full: {len(self._generations)} answers wait or run, {count} more were asked for, "
                f"{limit} are allowed; try again later",
                code="queue_full",
                retry_after=sorted(self._seconds)[len(self._seconds) // 2] if self._seconds else 1,
            )

    def submit(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingParams,
        count: int,
        *,
        stream: bool,
        cache_salt: str = "",
    ) -> Batch:
        """Ask for answers; those to one prompt follow each other.

        Args:
            prompts: ids of each prompt.
            sampling: how they are drawn.
            count: answers to each prompt.
            stream: whether to be told what is written before an answer is complete.
            cache_salt: only requests with the same share what was computed for prompts that begin alike.
        """
        batch = Batch(self, self.config.limits.request_timeout)
        for prompt_ids in prompts:
            made = [Generation(next(self._numbers), batch, time.monotonic()) for _ in range(count)]
            batch.generations += made
            self._generations |= {generation.number: generation for generation in made}
            self._send(
                {
                    "op": "add",
                    "ids": [generation.number for generation in made],
                    "prompt_ids": list(prompt_ids),
                    "sampling": dataclasses.asdict(sampling),
                    "stream": stream,
                    "cache_salt": cache_salt,
                }
            )
        self._idle.clear()
        return batch

    def cancel(self, numbers: Iterable[int]) -> None:
        """End answers; numbers of complete ones are ignored."""
        if ids := [number for number in numbers if number in self._generations]:
            self._send({"op": "cancel", "ids": ids})

    def _send(self, message: Message) -> None:
        if self._writer is not None and not self._writer.is_closing():
            self._writer.write(pack(message))

    def _handle(self, message: Message) -> None:
        self._last_heard = time.monotonic()
        op = message["op"]
        if op == "step":
            for number, branch, ids in message["writes"]:
                if (generation := self._generations.get(number)) is not None:
                    generation.writes.append((branch, ids))
                    generation.batch.tell()
            for number, fields in message["done"]:
                self._finish(number, result=result_from_dict(fields))
        elif op == "accepted":
            for number in self._generations.keys() & message["ids"]:
                self._generations[number].accepted = True
                self._generations[number].batch.tell()
        elif op == "refused":
            text = message["message"]
            error = ApiError(400, text) if text else ApiError(500, "the engine failed on this request")
            for number in message["ids"]:
                self._finish(number, error=error)
        elif op == "beat":
            self.stats = message["stats"]
        elif op == "ready":
            self.facts, self.state = message["facts"], "ready"
            self._settled.set()
        elif op == "failed":
            self.failure = message["message"]

    def _finish(self, number: int, *, result: Result | None = None, error: ApiError | None = None) -> None:
        generation = self._generations.pop(number, None)
        if generation is None:
            return
        generation.result = result
        if result is not None:
            seconds = time.monotonic() - generation.started
            self._seconds.append(seconds)
            if self.on_result is not None:
                self.on_result(result, seconds)
        generation.batch.tell(error)
        if not self._generations:
            self._idle.set()

    def _die(self) -> None:
        self.state = "dead"
        self._settled.set()
        if self._writer is None or not self._writer.is_closing():
            codes = [process.poll() for process in self.processes]
            logger.error("the engine has ended (exit codes of its processes: %s)", codes)
            self._kill()  # ranks wait for each other, so without one the others are of no use
        for number in list(self._generations):
            self._finish(number, error=unavailable("dead"))
