"""What it takes to read the largest bodies, and how long a stream stands still meanwhile.

All streams wait while the HTTP process makes objects of a body, since no parser lets other threads run. reading: CPU
time of that, beside the plain way, Python's json with collections going on, for the same bodies in turn; what others do
on the machine changes it little. gaps: a server writes a stream, and the time between its chunks is measured while
nothing else happens, or while one body is sent. Most are refused in the end, for their length or for a field; what
counts is what it takes to find that out. The ids of one text are asked for, which is of a quarter of the size. These
times need cores of their own.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import os
import random
import statistics
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import httpx2

from benchmarks.server.stalls import BODY, MODEL, TEXT
from megatron_multiverse.clients.http import connect, stream
from megatron_multiverse.clients.local_server import local_server
from megatron_multiverse.errors import GenerationError
from megatron_multiverse.model.device import choose_device
from megatron_multiverse.server.body import Fields, read_object
from megatron_multiverse.server.chat_fields import ChatFields
from megatron_multiverse.server.config import LimitConfig
from megatron_multiverse.server.errors import ApiError
from megatron_multiverse.server.garbage import freeze_objects
from megatron_multiverse.server.routes.completions import CompletionFields
from megatron_multiverse.server.routes.tokenizer import TokenizeFields

if TYPE_CHECKING:
    from benchmarks.server.__main__ import ServerBenchConfig

CHAT, TOKENIZE = "/v1/chat/completions", "/tokenize"
FIELDS: dict[str, type[Fields]] = {TEXT: CompletionFields, CHAT: ChatFields, TOKENIZE: TokenizeFields}
SIZE = LimitConfig().max_body_bytes - 1024
"""Bytes of a body, or a little less."""
REST_S = 0.3
"""Between bodies, and of the stretches without one."""


def large_bodies() -> dict[str, tuple[str, bytes]]:
    """(route, body) of each kind."""
    rng = random.Random(0)
    ids = [rng.randrange(100, 290) for _ in range(SIZE // 5)]
    turns = [{"role": "user", "content": "a"}] * (SIZE // 35)
    return {
        "ids": (TEXT, json.dumps({"prompt": ids}).encode()),
        "text": (TEXT, json.dumps({"prompt": "word " * (SIZE // 5)}).encode()),
        "tokens": (TOKENIZE, json.dumps({"prompt": "word " * (SIZE // 20)}).encode()),
        "turns": (CHAT, json.dumps({"messages": turns, "tools": [{"type": "none"}]}).encode()),
        "lists": (TEXT, b'{"prompt": 1, "other": [' + b"[]," * (SIZE // 3 - 16) + b"[]]}"),
        "objects": (TEXT, b'{"prompt": 1, "other": [' + b"{}," * (SIZE // 3 - 16) + b"{}]}"),
    }


def measure_bodies(config: ServerBenchConfig) -> dict[str, Any]:
    """For each kind of body the time of reading it both ways, and the longest gap of a stream beside it."""
    bodies = large_bodies()
    report: dict[str, Any] = {"bytes": SIZE, "cores": len(os.sched_getaffinity(0)), "reading_ms": {}}
    freeze_objects()  # as the server does
    for kind, (path, body) in bodies.items():
        plain = [_cpu_ms(lambda: _plain_way(FIELDS[path], body)) for _ in range(config.repeats)]  # noqa: B023
        own = [_cpu_ms(lambda: read_object(body, FIELDS[path])) for _ in range(config.repeats)]  # noqa: B023
        found = {"plain": round(statistics.median(plain), 1), "read_object": round(statistics.median(own), 1)}
        report["reading_ms"][kind] = found
        print(
            f"{kind:8} plain way {found['plain']:7.1f} ms, here {found['read_object']:7.1f} ms of the CPU", flush=True
        )
    report["longest_gap_ms"] = gaps = asyncio.run(_gaps(config, bodies))
    for kind, gap in gaps.items():
        print(f"{kind:8} median {gap['median']:7.1f} ms, most {gap['most']:7.1f} ms between two chunks", flush=True)
    return report | {"model": "examples/quickstart/model", "device": str(choose_device(config.device))}


def _cpu_ms(read: Callable[[], Any]) -> float:
    gc.collect()
    start = time.thread_time()
    with contextlib.suppress(ApiError, ValueError):  # a wrong field
        read()
    return (time.thread_time() - start) * 1e3


def _plain_way(fields: type[Fields], body: bytes) -> Fields:
    return fields.model_validate(json.loads(body.decode()))


async def _gaps(config: ServerBenchConfig, bodies: dict[str, tuple[str, bytes]]) -> dict[str, Any]:
    found: dict[str, list[float]] = {kind: [] for kind in ("alone", *bodies)}
    watched = _Watched()
    options = {"load": MODEL, "device": config.device, "engine.max-depth": 0}
    async with local_server(options) as (url, _), connect(url) as client, asyncio.TaskGroup() as group:
        reader = group.create_task(watched.read(client))
        await asyncio.sleep(3)
        for _ in range(config.repeats):
            for kind, gaps in found.items():
                watched.longest = 0.0
                if kind in bodies:
                    await _send(client, *bodies[kind])
                await asyncio.sleep(REST_S)
                gaps.append(watched.longest * 1e3)
        reader.cancel()
        await asyncio.gather(reader, return_exceptions=True)
    return {
        kind: {"median": statistics.median(gaps), "most": max(gaps), "all": [round(gap, 1) for gap in gaps]}
        for kind, gaps in found.items()
    }


async def _send(client: httpx2.AsyncClient, path: str, body: bytes) -> None:
    response = await client.post(path, content=body)
    if response.status_code != (200 if path == TOKENIZE else 400):
        raise GenerationError(f"{path} gave status {response.status_code}: {response.text[:200]}")


class _Watched:
    """A stream that is read for ever."""

    def __init__(self) -> None:
        self.longest = 0.0
        """Seconds between two chunks, since somebody set it to 0."""

    async def read(self, client: httpx2.AsyncClient) -> None:
        while True:
            async with contextlib.aclosing(stream(client, TEXT, BODY)) as chunks:  # type: ignore[type-var]
                last = None
                async for _ in chunks:
                    now = time.perf_counter()
                    self.longest = max(self.longest, 0.0 if last is None else now - last)
                    last = now
