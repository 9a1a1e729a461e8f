"""A server for tests: the real application over real sockets, its engine in a thread of the test process."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import httpx2
import pytest
import uvicorn
from fastapi import FastAPI

from megatron_multiverse.config import EngineConfig
from megatron_multiverse.data.tokenizers import MultiverseTokenizer, build_tokenizer
from megatron_multiverse.inference import Engine, build_engine
from megatron_multiverse.server.app import build_app
from megatron_multiverse.server.config import ServerConfig
from megatron_multiverse.server.engine_client import EngineClient
from megatron_multiverse.server.engine_process import EngineHost
from megatron_multiverse.server.model import ServedModel
from megatron_multiverse.server.start import KEEP_ALIVE_SECONDS
from megatron_multiverse.server.wire import Channel
from tests.waiting import PATIENCE_S, wait_until

MODEL = Path(__file__).parents[3] / "examples" / "quickstart" / "model"
PROMPT = "Work out A = 583 + 967; B = 48 + 76. Think step by step and in parallel before answering."


@cache
def tokenizer() -> MultiverseTokenizer:
    return build_tokenizer("HuggingFaceTokenizer", MODEL)


class SteppedHost(EngineHost):
    """Takes as many steps as tests allow; in between it hears messages as ever, and ends what is cancelled."""

    steps_left = math.inf
    is_passed_on: Callable[[], bool] | None = None
    """Whether all that was said to the HTTP side has been passed on; if given, each step waits for it."""

    def _step(self) -> None:
        if self.is_passed_on is not None and not self.is_passed_on():
            time.sleep(0.0005)
        elif self.steps_left > 0:
            self.steps_left -= 1
            super()._step()
        else:
            self._hold()
            time.sleep(0.001)


@dataclass
class Running:
    """A server that listens."""

    url: str
    app: FastAPI
    client: EngineClient
    host: SteppedHost
    theirs: socket.socket
    """The engine's end of the connection."""
    server: uvicorn.Server
    loop: asyncio.AbstractEventLoop
    """Of the HTTP side."""
    http: httpx2.Client

    @property
    def engine(self) -> Engine:
        """Another one after its memory was given back and taken again."""
        return self.host.engine

    def post(self, path: str, body: Any) -> httpx2.Response:
        return self.http.post(path, json=body)

    def wait_until_free(self) -> None:
        """Until nothing is left in the engine: no answer, no branch, no page."""
        wait_until(lambda: not self.client.num_generations and not self.engine.has_work, "no answer is in the making")
        wait_until(lambda: self.engine.book.available == self.engine.book.num_pages, "all pages are free")

    @contextlib.contextmanager
    def held_after(self, steps: int) -> Iterator[None]:
        """In the block the engine takes so many steps, when it has work, and no further one. So what is asked for in it
        is in the making until it ends, however slow the test is."""
        self.host.steps_left = steps
        try:
            yield
        finally:
            self.host.steps_left = math.inf

    @contextlib.contextmanager
    def in_step(self) -> Iterator[None]:
        """In the block the engine takes each step after the HTTP side has passed the one before on. So streams have a
        chunk for each of them; else a busy HTTP side passes several on at once."""
        said = heard = 0
        send, handle = self.host.channel.send, self.client._handle

        def counted_send(message: dict[str, Any]) -> None:
            nonlocal said
            said += message["op"] == "step"
            send(message)

        def counted_handle(message: dict[str, Any]) -> None:
            nonlocal heard
            handle(message)
            heard += message["op"] == "step"

        def is_passed_on() -> bool:
            return heard == said and not any(one.writes for one in list(self.client._generations.values()))

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(self.host.channel, "send", counted_send)
            patch.setattr(self.client, "_handle", counted_handle)
            patch.setattr(self.host, "is_passed_on", is_passed_on)
            yield

    def wait_until_held(self) -> None:
        """Until the engine has taken the steps of `held_after`."""
        wait_until(lambda: self.host.steps_left == 0, "the engine has taken its steps")

    @contextlib.contextmanager
    def visitor(self, path: str, body: Any) -> Iterator[None]:
        """A client that asks, and leaves without an answer at the end of the block."""
        host, port = self.url.removeprefix("http://").split(":")
        content = json.dumps(body).encode()
        with socket.create_connection((host, int(port))) as connection:
            head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(content)}\r\n\r\n"
            connection.sendall(head.encode() + content)
            yield

    def skip(self, seconds: float) -> None:
        """The clock of the HTTP side goes forward, so that what it has set for then happens now."""
        now = self.loop.time
        self.loop.time = lambda: now() + seconds  # type: ignore[method-assign]
        self.loop.call_soon_threadsafe(lambda: None)  # wakes it


def running_with(template: str, folder: Path) -> contextlib.AbstractContextManager[Running]:
    """`running` with this chat template, which is written into a folder."""
    path = folder / "chat.jinja"
    path.write_text(template)
    return running(chat_template=path)


@contextlib.contextmanager
def running(
    *, load: Path = MODEL, keys: Sequence[str] = (), engine: EngineConfig | None = None, **options: Any
) -> Iterator[Running]:
    """Serve a model, the quickstart's by default, until the block ends."""
    config = ServerConfig(load=load, engine=engine or EngineConfig(max_rows=16), **options)
    built = build_engine(load, tokenizer(), config.engine)
    own, theirs = socket.socketpair()
    host = SteppedHost(built, Channel(theirs), str(config.load))
    stepping = threading.Thread(target=host.run, daemon=True)
    stepping.start()
    client = EngineClient(config)
    app = build_app(config, client, ServedModel(config, tokenizer()), keys)
    options_of_http: dict[str, Any] = {"timeout_keep_alive": KEEP_ALIVE_SECONDS, "timeout_graceful_shutdown": 2}
    server = uvicorn.Server(uvicorn.Config(app, port=0, http="h11", log_level="error", **options_of_http))

    loops: list[asyncio.AbstractEventLoop] = []

    async def main() -> None:
        loops.append(asyncio.get_running_loop())
        listening = asyncio.create_task(client.listen(own))
        await server.serve()
        await client.close()
        await listening

    thread = threading.Thread(target=asyncio.run, args=[main()], daemon=True)
    thread.start()
    try:
        wait_until(lambda: server.started and client.state != "loading", "the server is ready")
        port = server.servers[0].sockets[0].getsockname()[1]
        url = f"http://127.0.0.1:{port}"
        with httpx2.Client(base_url=url, timeout=PATIENCE_S) as http:
            yield Running(url, app, client, host, theirs, server, loops[0], http)
    finally:
        server.should_exit = True
        thread.join(PATIENCE_S)
        stepping.join(PATIENCE_S)
        assert not thread.is_alive() and not stepping.is_alive(), "the server did not end"
