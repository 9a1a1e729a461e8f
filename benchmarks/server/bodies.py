"""How long a stream stands still while the HTTP process reads another client's large body.

A stream is read all the time, and the time between its chunks is measured. In turns, nothing else happens for as long
as a body would take, or one body of nearly the largest size allowed is sent. All of them are refused in the end, for
their length or for a field; what counts is what it takes to find that out.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import statistics
import time
from typing import TYPE_CHECKING, Any

import httpx2

from benchmarks.server.stalls import BODY, MODEL, TEXT
from megatron_multiverse.clients.http import connect, stream
from megatron_multiverse.clients.local_server import local_server
from megatron_multiverse.errors import GenerationError
from megatron_multiverse.model.device import choose_device
from megatron_multiverse.server.config import LimitConfig

if TYPE_CHECKING:
    from benchmarks.server.__main__ import ServerBenchConfig

CHAT = "/v1/chat/completions"
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
        "turns": (CHAT, json.dumps({"messages": turns, "tools": [{"type": "none"}]}).encode()),
        "lists": (TEXT, b'{"prompt": 1, "other": [' + b"[]," * (SIZE // 3 - 16) + b"[]]}"),
        "objects": (TEXT, b'{"prompt": 1, "other": [' + b"{}," * (SIZE // 3 - 16) + b"{}]}"),
    }


def measure_bodies(config: ServerBenchConfig) -> dict[str, Any]:
    """The longest time between two chunks of a stream while a body is read, for each kind of body."""
    report = asyncio.run(_measure(config))
    print(f"device {report['device']}, {report['cores']} cores for clients, HTTP and engine")
    for kind, found in report["longest_gap_ms"].items():
        print(f"{kind:8} median {found['median']:7.1f} ms, most {found['most']:7.1f} ms between two chunks", flush=True)
    return report


async def _measure(config: ServerBenchConfig) -> dict[str, Any]:
    bodies = large_bodies()
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
        "model": "examples/quickstart/model",
        "device": str(choose_device(config.device)),
        "cores": len(os.sched_getaffinity(0)),
        "bytes": SIZE,
        "longest_gap_ms": {
            kind: {"median": statistics.median(gaps), "most": max(gaps), "all": [round(gap, 1) for gap in gaps]}
            for kind, gaps in found.items()
        },
    }


async def _send(client: httpx2.AsyncClient, path: str, body: bytes) -> None:
    response = await client.post(path, content=body)
    if response.status_code != 400:
        raise GenerationError(f"a body that must be refused got status {response.status_code}")


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
