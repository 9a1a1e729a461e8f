"""How long steps take while clients disturb the HTTP process.

The same clients write all the time. In turns, nobody else does, or others read their stream slowly, send large
bodies, have long texts tokenized and send broken JSON. The engine times its steps itself (`multiverse_step_seconds`).
Where other programs share the cores these times tell of them, too, so the machine must be idle. That the engine goes on
even while the HTTP process stands still is a test (`tests/unit/server/test_tool.py`).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx2

from megatron_multiverse.clients.http import connect, post, stream
from megatron_multiverse.clients.local_server import local_server
from megatron_multiverse.errors import GenerationError
from megatron_multiverse.model.device import choose_device

if TYPE_CHECKING:
    from benchmarks.server.__main__ import ServerBenchConfig

MODEL = Path(__file__).parents[2] / "examples" / "quickstart" / "model"
TEXT = "/v1/completions"
WRITERS = 8
"""Clients whose answers keep the engine busy."""
BODY = {"prompt": "Work out A = 583 + 967.", "max_tokens": 1000, "temperature": 0, "ignore_eos": True}
LARGE = json.dumps({"prompt": "word " * 800_000}).encode()
"""About 4 MB: read, parsed and tokenized before it is refused for its length."""


def measure_stalls(config: ServerBenchConfig) -> dict[str, Any]:
    """Quantiles of the step time with and without disturbance, turn by turn."""
    report = asyncio.run(_measure(config))
    print(f"device {report['device']}, {report['cores']} cores for clients, HTTP and engine")
    for turn in report["turns"]:
        print(
            f"{turn['kind']:10} {turn['steps']:6} steps, p50 {turn['p50_ms']:.2f} ms, p99 {turn['p99_ms']:.2f} ms, "
            f"longest {turn['longest_ms']:.2f} ms; {turn['disturbances']} disturbances",
            flush=True,
        )
    return report


async def _measure(config: ServerBenchConfig) -> dict[str, Any]:
    turns = []
    options = {"load": MODEL, "device": config.device, "engine.max-depth": 0}
    async with local_server(options) as (url, _), connect(url) as client, asyncio.TaskGroup() as group:
        writers = [group.create_task(_forever(lambda: post(client, TEXT, BODY))) for _ in range(WRITERS)]
        await asyncio.sleep(3)
        for _ in range(config.turns):
            for kind, visits in (("alone", [_quick]), ("disturbed", [_slow, _large, _tokenize, _broken])):
                done = [0]
                disturbing = [group.create_task(_forever(lambda v=v: v(client), done)) for v in visits]  # type: ignore[misc]
                await asyncio.sleep(1)
                before = await _steps(client)
                await asyncio.sleep(config.seconds)
                turns.append({"kind": kind, "disturbances": done[0], **_quantiles(before, await _steps(client))})
                await _end(disturbing)
        await _end(writers)
    return {
        "model": "examples/quickstart/model",
        "device": str(choose_device(config.device)),
        "cores": len(os.sched_getaffinity(0)),
        "writers": WRITERS,
        "seconds": config.seconds,
        "turns": turns,
    }


async def _forever(visit: Callable[[], Awaitable[Any]], done: list[int] | None = None) -> None:
    while True:
        await visit()
        if done is not None:
            done[0] += 1


async def _end(tasks: list[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def _large(client: httpx2.AsyncClient) -> None:
    _refused(await client.post(TEXT, content=LARGE))


async def _tokenize(client: httpx2.AsyncClient) -> None:
    await post(client, "/tokenize", {"prompt": "A = 583 + 967; " * 20_000})


async def _broken(client: httpx2.AsyncClient) -> None:
    _refused(await client.post(TEXT, content=b"[" * 1_000_000))


def _refused(response: httpx2.Response) -> None:
    if response.status_code != 400:
        raise GenerationError(f"a body that must be refused got status {response.status_code}")


async def _quick(client: httpx2.AsyncClient) -> None:
    """The stream of `_slow`, read at once: the same work for the engine."""
    async with contextlib.aclosing(stream(client, TEXT, BODY | {"max_tokens": 300})) as chunks:  # type: ignore[type-var]
        async for _ in chunks:
            pass


async def _slow(client: httpx2.AsyncClient) -> None:
    async with contextlib.aclosing(stream(client, TEXT, BODY | {"max_tokens": 300})) as chunks:  # type: ignore[type-var]
        async for _ in chunks:
            await asyncio.sleep(0.02)


Steps = list[tuple[float, float]]
"""(upper bound in seconds, steps that took no longer), as Prometheus has histograms."""


async def _steps(client: httpx2.AsyncClient) -> Steps:
    await asyncio.sleep(1)  # for the next beat of the engine
    name = 'multiverse_step_seconds_bucket{le="'
    lines = [line.removeprefix(name) for line in (await client.get("/metrics")).text.splitlines() if name in line]
    pairs = [line.split('"} ') for line in lines]
    return [(float(bound), float(count)) for bound, count in pairs]


def _quantiles(before: Steps, after: Steps) -> dict[str, Any]:
    """Upper bounds of the buckets in which the quantiles lie; they are a tenth to a quarter apart."""
    counts = [(bound, count - old) for (bound, count), (_, old) in zip(after, before, strict=True)]
    total = counts[-1][1]

    def reached(share: float) -> float:
        return next(bound for bound, count in counts if count >= share * total) * 1e3

    return {"steps": int(total), "p50_ms": reached(0.5), "p99_ms": reached(0.99), "longest_ms": reached(1.0)}
