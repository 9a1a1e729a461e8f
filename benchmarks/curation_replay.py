"""The server of the curator's throughput: in a process of its own, with every answer made before the run.

It reads from a request only the number of the sample, the stage, and whether the answer is to be streamed, so that it
takes next to nothing from the cores that the curator needs.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

from megatron_multiverse.curation.rules import Rules
from megatron_multiverse.curation.token_counts import RoughTokens
from megatron_multiverse.structure import Parts
from tests.unit.curation.drive import drive
from tests.unit.curation.http_wire import head
from tests.unit.curation.messages import STAGE_WORDS, Messages, digest_of, events
from tests.unit.curation.scripted import Script

_SAMPLE = re.compile(rb"\[1\] Sample (\d+)\.")
_STAGE = re.compile(rb'"text": ?"(' + "|".join(STAGE_WORDS).encode() + rb")")
_LENGTH = re.compile(rb"content-length: *(\d+)", re.IGNORECASE)
_STREAMED = re.compile(rb'"stream": ?true')
Answers = dict[tuple[int, str], tuple[bytes, bytes]]
"""(sample, stage) -> the whole answer, and the same streamed."""


def numbered(parts: Parts, number: int) -> Parts:
    """The same trajectory as another sample."""
    first = parts[0]
    return (f"Sample {number}.\n{first}", *parts[1:]) if isinstance(first, str) else (f"Sample {number}.", *parts)


@dataclass
class Seen:
    """What the server has seen; times in seconds."""

    begun: list[float] = field(default_factory=list)
    ended: list[float] = field(default_factory=list)
    last_sample_begun: float = 0.0
    """When the first request of the last sample came: from then on fewer and fewer samples are left to ask for."""
    cpu_s: float = 0.0

    def busy(self, until: float) -> float:
        """Mean number of requests that the server had received and not answered, from the first one on."""
        under_way = sum(min(time, until) for time in self.ended) - sum(min(time, until) for time in self.begun)
        return under_way / (until - self.begun[0])


class ReplayServer:
    """Use it as a context manager.

    Args:
        scripts: whose chains begin as `numbered` makes them begin.
        latency_s: seconds that an answer takes.
    """

    def __init__(self, scripts: Sequence[Script], latency_s: float) -> None:
        self._pipe, theirs = multiprocessing.Pipe()
        arguments = (_prebuilt(scripts), latency_s, theirs)
        self._process = multiprocessing.get_context("fork").Process(target=_run, args=arguments, daemon=True)

    def __enter__(self) -> ReplayServer:
        self._process.start()
        self.url = f"http://127.0.0.1:{self._pipe.recv()}"
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.join()

    def end(self) -> Seen:
        """Stop it; what it has seen."""
        self._pipe.send("end")
        seen = self._pipe.recv()
        assert isinstance(seen, Seen)
        self._process.join()
        return seen


def _prebuilt(scripts: Sequence[Script]) -> Answers:
    rules = Rules(RoughTokens(), min_net_gain=0, independence="report")
    messages = Messages(scripts, thinking_tokens=4_000)
    answers: Answers = {}
    for number, script in enumerate(scripts):
        for request in drive(script, rules)[1]:
            content = [{"text": request.shared}, {"text": request.task}]
            body: dict[str, Any] = {"model": "replayed", "messages": [{"role": "user", "content": content}]}
            message = messages.message(body, digest_of(body), "")
            data = json.dumps(message).encode()
            assert isinstance(message, dict), message
            stream = b"".join([head(200, "text/event-stream", None), *events(message), b"0\r\n\r\n"])
            answers[number, request.stage] = head(200, "application/json", len(data)) + data, stream
    return answers


class _Connection(asyncio.Protocol):
    def __init__(self, answers: Answers, latency_s: float, seen: Seen) -> None:
        self.answers, self.latency_s, self.seen = answers, latency_s, seen
        self.data = bytearray()
        self.expected = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.data += data
        if not self.expected and (end := self.data.find(b"\r\n\r\n")) >= 0:
            length = _LENGTH.search(self.data, 0, end)
            assert length is not None, bytes(self.data[:end])
            self.expected = end + 4 + int(length[1])
        if self.expected and len(self.data) >= self.expected:
            request, self.data, self.expected = bytes(self.data), bytearray(), 0
            now = time.monotonic()
            sample, stage = _SAMPLE.search(request), _STAGE.search(request)
            assert sample is not None and stage is not None, request[:300]
            name = STAGE_WORDS[stage[1].decode()]
            self.seen.begun.append(now)
            if name == "outline":
                self.seen.last_sample_begun = now
            answer = self.answers[int(sample[1]), name][_STREAMED.search(request) is not None]
            asyncio.get_running_loop().call_later(self.latency_s, self._answer, answer)

    def _answer(self, answer: bytes) -> None:
        self.transport.write(answer)
        self.seen.ended.append(time.monotonic())


def _run(answers: Answers, latency_s: float, pipe: Connection) -> None:
    asyncio.run(_serve(answers, latency_s, pipe))


async def _serve(answers: Answers, latency_s: float, pipe: Connection) -> None:
    seen, loop, ended = Seen(), asyncio.get_running_loop(), asyncio.Event()
    server = await loop.create_server(lambda: _Connection(answers, latency_s, seen), "127.0.0.1", 0)
    pipe.send(server.sockets[0].getsockname()[1])
    loop.add_reader(pipe.fileno(), ended.set)
    started = time.process_time()
    await ended.wait()
    seen.cpu_s = time.process_time() - started
    pipe.send(seen)
