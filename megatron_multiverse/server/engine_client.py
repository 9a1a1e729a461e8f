"""The HTTP side of the engine process: starts it, hands it work, hears what it writes, notices when it dies."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import logging
import socket
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from megatron_multiverse.errors import ContextError
from megatron_multiverse.inference.intake import check_length
from megatron_multiverse.inference.record import from_values
from megatron_multiverse.inference.text.result import Result
from megatron_multiverse.server.batch import Asked, Batch, Generation, Write
from megatron_multiverse.server.config import ServerConfig
from megatron_multiverse.server.errors import ApiError, unavailable
from megatron_multiverse.server.processes import EngineProcesses
from megatron_multiverse.server.wire import HEADER, Message, pack, unpack

logger = logging.getLogger(__name__)

SECONDS_TO_END = 15.0
"""For processes that were told to: on a busy machine the end of an interpreter with torch in it takes seconds."""
SECONDS_TO_EXPLAIN = 5.0
"""For the first rank to say why the engine does not start, after another rank has ended for the same reason."""


@dataclasses.dataclass(frozen=True)
class EngineState:
    """What was done to the engine as a whole."""

    paused: bool = False
    released: tuple[str, ...] = ()
    """Kinds of memory that it has given back; there is no engine until it has them again."""
    versions: tuple[str, ...] = ("default",)
    """Names of the weights that were in use, by their number; the last ones are now."""
    incomplete: tuple[str, ...] = ()
    """Tensors that a trainer has sent and that wait for others of the same matrix."""
    weights: str = ""
    """A hash of those that are in use now; empty until the engine is ready."""


class EngineClient:
    """Starts an engine process and talks to it. All methods belong to one event loop.

    Attributes:
        state: "loading", "ready" or "dead".
        facts: device and sizes of the engine (`device`, `max_position`, `num_pages`, `page_size`, `max_rows`) once
            it is ready.
        stats: what the engine last said of itself.
    """

    def __init__(self, config: ServerConfig) -> None:
        self.config = config
        self.state = "loading"
        self.facts: dict[str, Any] = {}
        self.stats: dict[str, Any] = {}
        self.failure = ""
        """Why the engine could not start."""
        self.processes = EngineProcesses()
        self.control = EngineState()
        """What was done to the engine as a whole."""
        self.on_result: Callable[[Result, float], None] | None = None
        """Called with every complete answer and the seconds since it was asked for."""
        self._generations: dict[int, Generation] = {}
        self._controls: dict[int, asyncio.Future[None]] = {}
        self._numbers = itertools.count()
        self._writer: asyncio.StreamWriter | None = None
        self._is_closed = False  # by this side: a connection that is lost closes the writer, too
        self._last_heard = time.monotonic()
        self._seconds: deque[float] = deque(maxlen=64)  # how long the last answers took
        self._settled = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()

    async def run(self) -> None:
        """Start the engine's processes and listen to them until one ends."""
        with self.processes.started(self.config.num_ranks, self._start_message()) as (first, *others):
            await self.listen(first, others)

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
        if self._is_closed:
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
            "weights_interface": config.weights_interface,
        }

    async def close(self) -> None:
        """Let the engine's processes end, and see to it that they do."""
        self._is_closed = True
        if self._writer is not None:
            self._writer.close()
        # Not in this thread: its event loop closes the connection, and that is what the processes end by.
        await asyncio.to_thread(self.processes.wait, SECONDS_TO_END)

    @property
    def num_generations(self) -> int:
        """Answers in the making, waiting ones included."""
        return len(self._generations)

    @property
    def condition(self) -> str:
        """`state`; a ready engine can be "released", without memory, or "stalled", too long without a sign of life."""
        if self.state != "ready":
            return self.state
        if self.control.released:
            return "released"
        silent = time.monotonic() - self._last_heard
        return "stalled" if silent > self.config.limits.engine_timeout and not self._controls else "ready"

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
            ApiError: 503 where the engine is not ready, 429 where the queue is full, 400 where it never fits in.
        """
        if self.condition != "ready":
            raise unavailable(self.condition)
        limit = self.config.limits.max_queued
        if count > limit:  # one who is told to come later would come for ever
            raise ApiError(
                400,
                f"{count} answers asked for at once (prompts x n), at most {limit} may wait or run on this server: "
                "send several requests with fewer each",
                code="too_many_answers",
            )
        if len(self._generations) + count > limit:
            raise ApiError(
                429,
                f"the queue is full: {len(self._generations)} answers wait or run, {count} more were asked for, "
                f"{limit} are allowed; try again later",
                code="queue_full",
                retry_after=sorted(self._seconds)[len(self._seconds) // 2] if self._seconds else 1,
            )

    def check_lengths(self, asked: Asked) -> None:
        """Refuse what model or cache could never hold, before the engine is told of it: it would read all of it between
        two steps.

        Raises:
            ApiError: 400, naming the numbers.
        """
        sizes = {name: self.facts[name] for name in ("max_position", "num_pages", "page_size")}
        try:
            for prompt in asked.prompts:
                check_length(len(prompt), asked.sampling.max_tokens, **sizes)
        except ContextError as error:
            raise ApiError(400, str(error), code="context_length_exceeded") from None

    def submit(self, asked: Asked, *, stream: bool, cache_salt: str = "") -> Batch:
        """Ask for answers; those to one prompt follow each other.

        Args:
            asked: for what.
            stream: whether to be told what is written before an answer is complete.
            cache_salt: only requests with the same share what was computed for prompts that begin alike.
        """
        batch = Batch(self, self.config.limits.request_timeout)
        sampling = dataclasses.asdict(asked.sampling)
        for prompt_ids, rid in itertools.zip_longest(asked.prompts, asked.rids):
            made = [Generation(next(self._numbers), batch, rid, time.monotonic()) for _ in range(asked.count)]
            batch.generations += made
            self._generations |= {generation.number: generation for generation in made}
            self._send(
                {
                    "op": "add",
                    "ids": [generation.number for generation in made],
                    "prompt_ids": list(prompt_ids),
                    "sampling": sampling,
                    "stream": stream,
                    "cache_salt": cache_salt,
                    "priority": asked.priority,
                    "replay_structure": asked.replay_structure,
                    "answer_start": asked.answer_start,
                    "thought": asked.thought,
                }
            )
        self._idle.clear()
        return batch

    def cancel(self, numbers: Iterable[int]) -> None:
        """End answers; numbers of complete ones are ignored."""
        if ids := [number for number in numbers if number in self._generations]:
            self._send({"op": "cancel", "ids": ids})

    def abort(self, rid: str) -> None:
        """End the answers to the prompts of that name."""
        self.cancel([number for number, generation in self._generations.items() if generation.rid == rid])

    async def act(self, op: str, **fields: Any) -> None:
        """Do something to the engine as a whole, between two of its steps; `control` says what has become of it.

        Raises:
            ApiError: 400 with what the engine says against it; 503 where there is no engine, or it dies.
        """
        if self.state != "ready":
            raise unavailable(self.state)
        number = next(self._numbers)
        future = self._controls[number] = asyncio.get_running_loop().create_future()
        self._send({"op": op, "number": number, **fields})
        try:
            await future
        finally:
            self._controls.pop(number, None)

    def _send(self, message: Message) -> None:
        if self._writer is not None and not self._writer.is_closing():
            self._writer.write(pack(message))

    def _handle(self, message: Message) -> None:
        self._last_heard = time.monotonic()
        op = message["op"]
        if op == "step":
            for number, *write in message["writes"]:
                if (generation := self._generations.get(number)) is not None:
                    generation.writes.append(Write(*write))
                    generation.batch.tell()
            for number, fields in message["done"]:
                self._finish(number, result=from_values(fields))
        elif op == "accepted":
            for number in self._generations.keys() & message["ids"]:
                self._generations[number].accepted = True
                self._generations[number].batch.tell()
        elif op == "refused":
            text = message["message"]
            failed = ApiError(500, "the engine failed on this request")
            error = ApiError(400, text, code=message["code"]) if text else failed
            for number in message["ids"]:
                self._finish(number, error=error)
        elif op == "controlled":
            self.control = _state(message["control"])
            if (future := self._controls.get(message["number"])) is not None and not future.done():
                error = message["error"]
                future.set_exception(ApiError(400, error, code="refused")) if error else future.set_result(None)
        elif op == "beat":
            self.stats = message["stats"]
        elif op == "ready":
            self.facts, self.control, self.state = message["facts"], _state(message["control"]), "ready"
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
        if not self._is_closed:
            logger.error("the engine has ended (exit codes of its processes: %s)", self.processes.codes)
            self.processes.kill()  # ranks wait for each other, so without one the others are of no use
        for number in list(self._generations):
            self._finish(number, error=unavailable("dead"))
        for future in self._controls.values():
            if not future.done():
                future.set_exception(unavailable("dead"))


def _state(values: Message) -> EngineState:
    fields: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
    return EngineState(**fields)
