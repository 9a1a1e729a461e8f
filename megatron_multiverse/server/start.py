"""Starts the server and ends it in order: what tools/run_text_generation_server.py does."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import os
import signal
import socket
from collections.abc import Iterator

import uvicorn
from fastapi import FastAPI

from megatron_multiverse.checkpoints.sources import loadable
from megatron_multiverse.data.tokenizers import build_tokenizer
from megatron_multiverse.errors import ConfigError
from megatron_multiverse.server.app import build_app, is_loopback
from megatron_multiverse.server.config import ServerConfig
from megatron_multiverse.server.engine_client import EngineClient
from megatron_multiverse.server.garbage import freeze_objects
from megatron_multiverse.server.model import ServedModel

logger = logging.getLogger(__name__)

KEY_VARIABLE = "MULTIVERSE_API_KEY"
LARGEST_HEADER = 16 * 1024
KEEP_ALIVE_SECONDS = 75
"""Idle connections stay open for longer than clients keep them: httpx, so OpenAI's SDK, 5 s, load balancers often 60. A
server that closed first would now and then do so when the next request is on its way, which is lost then."""
SECONDS_TO_SAY_GOODBYE = 10
"""For cancelled answers to come back and be sent, before connections are cut."""


def serve(config: ServerConfig) -> None:
    """Serve until SIGTERM or SIGINT, then let running answers finish.

    Raises:
        CheckpointError: no folder with a checkpoint.
        ConfigError: options that cannot work, or the engine did not start.
        OSError: the address cannot be listened at.
    """
    config = dataclasses.replace(config, load=loadable(config.load), served_model_name=config.model_name)
    keys = read_keys(config)
    if not keys and not is_loopback(config.host):
        raise ConfigError(
            f"--host {config.host} lets other machines in, so the server needs keys: name a file with --api-key-file, "
            f"or set {KEY_VARIABLE}; without keys listen at 127.0.0.1"
        )
    model = ServedModel(config, build_tokenizer(config.tokenizer_type, config.tokenizer_model or config.load))
    client = EngineClient(config)
    app = build_app(config, client, model, keys)
    with contextlib.closing(_listen(config)) as listener:
        logger.info("listening at http://%s:%d", config.host, listener.getsockname()[1])
        asyncio.run(_serve(config, client, app, listener))


def read_keys(config: ServerConfig) -> list[str]:
    """The keys that open the server.

    Raises:
        ConfigError: a file without keys, or a key that no header can carry.
    """
    keys = [os.environ[KEY_VARIABLE]] if os.environ.get(KEY_VARIABLE) else []
    if config.api_key_file is not None:
        own = [line.strip() for line in config.api_key_file.read_text(encoding="utf-8").splitlines() if line.strip()]
        if not own:
            raise ConfigError(f"--api-key-file {config.api_key_file} is empty; write one key a line")
        keys += own
    if not all(key.isascii() and key.isprintable() and " " not in key for key in keys):
        raise ConfigError("a key holds blanks or characters beyond ASCII, which no header carries; choose another")
    return keys


def _listen(config: ServerConfig) -> socket.socket:
    """Taken before the model is loaded, so that a port in use shows at once and probes get 503 meanwhile."""
    try:
        (family, kind, protocol, _, address), *_ = socket.getaddrinfo(
            config.host, config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        raise ConfigError(
            f"cannot listen at {config.host}, port {config.port} ({error.strerror}); choose another with --port"
        ) from error
    return listener


class _Server(uvicorn.Server):
    """uvicorn, whose own handling of signals would close the port first, so that nobody could hear of the draining."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def _serve(config: ServerConfig, client: EngineClient, app: FastAPI, listener: socket.socket) -> None:
    server = _Server(
        uvicorn.Config(
            app,
            http="h11",  # limits the size of headers, which httptools does not
            h11_max_incomplete_event_size=LARGEST_HEADER,
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=SECONDS_TO_SAY_GOODBYE,
        )
    )
    signals = _Signals()
    http = asyncio.create_task(server.serve(sockets=[listener]))
    engine = asyncio.create_task(client.run())
    try:
        starting = asyncio.create_task(client.settle())
        await asyncio.wait([http, starting, signals.first], return_when=asyncio.FIRST_COMPLETED)
        if client.state == "dead":
            raise ConfigError(client.failure or "the engine ended while it loaded the model; its log says why")
        if client.state == "ready":
            freeze_objects()
            logger.info("ready: %s", client.facts)
        await asyncio.wait([http, signals.first], return_when=asyncio.FIRST_COMPLETED)
        app.state.draining = True
        await _drain(config, client, signals)
    finally:
        server.should_exit = True
        await http
        await client.close()
        await asyncio.wait([engine], timeout=SECONDS_TO_SAY_GOODBYE)


async def _drain(config: ServerConfig, client: EngineClient, signals: _Signals) -> None:
    """Let running answers finish, for a while or until a second signal; then cancel them, which their clients hear."""
    logger.info("draining: %d answers in the making", client.num_generations)
    idle = asyncio.create_task(client.idle())
    await asyncio.wait([idle, signals.second], timeout=config.limits.drain_timeout, return_when=asyncio.FIRST_COMPLETED)
    if not idle.done():
        logger.info("cancelling %d answers", client.num_generations)
        client.cancel_all()
        await asyncio.wait([idle], timeout=SECONDS_TO_SAY_GOODBYE)
    idle.cancel()


class _Signals:
    """The first and the second SIGTERM or SIGINT, as things to wait for."""

    def __init__(self) -> None:
        loop = asyncio.get_running_loop()
        self.first: asyncio.Future[None] = loop.create_future()
        self.second: asyncio.Future[None] = loop.create_future()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._arrived)

    def _arrived(self) -> None:
        waiting = self.second if self.first.done() else self.first
        if not waiting.done():
            waiting.set_result(None)
