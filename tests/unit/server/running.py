"""A server for tests: the real application over real sockets, its engine in a thread of the test process."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import httpx2
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
from megatron_multiverse.server.wire import Channel

MODEL = Path(__file__).parents[3] / "examples" / "quickstart" / "model"
PROMPT = "Work out A = 583 + 967; B = 48 + 76. Think step by step and in parallel before answering."


@cache
def tokenizer() -> MultiverseTokenizer:
    return build_tokenizer("HuggingFaceTokenizer", MODEL)


@dataclass
class Running:
    """A server that listens."""

    url: str
    app: FastAPI
    client: EngineClient
    engine: Engine
    theirs: socket.socket
    """The engine's end of the connection."""
    server: uvicorn.Server
    http: httpx2.Client

    def post(self, path: str, body: Any) -> httpx2.Response:
        return self.http.post(path, json=body)

    def wait_until_free(self, seconds: float = 10.0) -> None:
        """Until nothing is left in the engine: no answer, no branch, no page."""
        limit = time.monotonic() + seconds
        while time.monotonic() < limit:
            book = self.engine.book
            if not (self.client.num_generations or self.engine.has_work) and book.available == book.num_pages:
                return
            time.sleep(0.005)
        raise AssertionError(f"still busy: {self.client.num_generations} answers, {self.client.stats}")


@contextlib.contextmanager
def running(*, keys: Sequence[str] = (), engine: EngineConfig | None = None, **options: Any) -> Iterator[Running]:
    """Serve the quickstart's model until the block ends."""
    config = ServerConfig(load=MODEL, engine=engine or EngineConfig(max_rows=16), **options)
    built = build_engine(MODEL, tokenizer(), config.engine)
    own, theirs = socket.socketpair()
    host = threading.Thread(target=EngineHost(built, Channel(theirs)).run, daemon=True)
    host.start()
    client = EngineClient(config)
    app = build_app(config, client, ServedModel(config, tokenizer()), keys)
    server = uvicorn.Server(uvicorn.Config(app, port=0, http="h11", log_level="error", timeout_graceful_shutdown=2))

    async def main() -> None:
        listening = asyncio.create_task(client.listen(own))
        await server.serve()
        await client.close()
        await listening

    thread = threading.Thread(target=asyncio.run, args=[main()], daemon=True)
    thread.start()
    try:
        while not (server.started and client.state != "loading"):
            time.sleep(0.005)
        port = server.servers[0].sockets[0].getsockname()[1]
        url = f"http://127.0.0.1:{port}"
        with httpx2.Client(base_url=url, timeout=60) as http:
            yield Running(url, app, client, built, theirs, server, http)
    finally:
        server.should_exit = True
        thread.join(20)
        host.join(20)
        assert not thread.is_alive() and not host.is_alive(), "the server did not end"
