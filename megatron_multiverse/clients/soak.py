"""Soak test of a server: what tools/dev/soak_server.py does.

It starts a server on this machine with a cache so small that answers step back, and lets random clients at it: whole
and streamed answers, clients that cancel, leave or read slowly, several answers at once, bodies that are broken. What
must hold: every request gets the status it deserves, nothing hangs, answers are those of a server that is not
disturbed, and in the end no page is missing. Then it kills the engine under load, and one of the two ranks of another
server: all that wait must hear of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import psutil

from megatron_multiverse.clients.http import ServerError, connect, post, stream
from megatron_multiverse.clients.local_server import local_server

PROMPTS = [
    "Work out A = 583 + 967; B = 48 + 76. Think step by step and in parallel before answering.",
    "Work out A = 72 - 15; B = (21 + 34) - (11 * 3). Think step by step and in parallel before answering.",
    "Work out A = 914 * 2. Think step by step before answering.",
    "Work out A = 5 + 6.",
]
LENGTHS = (1, 2, 4, 8, 16, 60, 400)
WEIGHTS = (24, 22, 20, 15, 10, 4, 2)
OUTLINES = "".join(f"\n<Outline>\n{label}: part\n</Outline>" for label in (1, 2, 3))
PLANNED = {"answer_start": f"<Parallel>\n<Goal>{OUTLINES}\n</Goal>", "branch_max_tokens": 12}
"""A block that the client asks for, with a limit for each path."""
PLANNED_TOKENS = 150
TEXT = "/v1/completions"
LONGEST_WAIT = 120.0
"""Seconds after which an answer counts as a hang."""


@dataclass(frozen=True, kw_only=True)
class SoakConfig:
    """What is tried."""

    load: Path = Path("examples/quickstart/model")
    """Model of the server."""
    seconds: float = 240.0
    """How long clients come."""
    rate: float = 12.0
    """Clients a second, at random times."""
    most_at_once: int = 48
    """Clients at once; more wait to come."""
    num_pages: int = 28
    """Pages of the cache: few, so that answers must step back for each other."""
    max_queued: int = 40
    """Answers that the server takes at once."""
    seed: int = 0
    """Of all that is random here."""
    output: Path | None = None
    """JSON file for the report."""


@dataclass
class Tally:
    """What happened."""

    kinds: Counter[str] = field(default_factory=Counter)
    statuses: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    """What should not have happened."""
    hangs: int = 0
    compared: int = 0
    """Answers held against the undisturbed ones."""


class Clients:
    """Random clients of one server.

    Args:
        config: what is tried.
        url: of the server.
    """

    def __init__(self, config: SoakConfig, url: str) -> None:
        self.config = config
        self.url = url
        self.tally = Tally()
        self.rng = random.Random(config.seed)
        self.expected: dict[tuple[int, int], str] = {}
        self.planned: list[str] = []
        """Answers to the prompts that begin with `PLANNED`."""
        self._stray: dict[str, int] = {}  # bias by which an answer begins with a tag out of place
        self._kinds: list[tuple[int, Callable[[httpx2.AsyncClient], Awaitable[None]]]] = [
            (30, self._whole),
            (20, self._streamed),
            (8, self._cancelled),
            (8, self._left),
            (2, self._slow),
            (6, self._several),
            (24, self._malformed),
            (12, self._asks),
            (4, self._plans),
            (3, self._breaks),
        ]

    async def learn(self) -> None:
        """The answers of the server while nobody else is there."""
        async with connect(self.url) as client:
            for prompt in range(len(PROMPTS)):
                for length in LENGTHS:
                    answer = await post(client, TEXT, self._body(prompt, length))
                    self.expected[prompt, length] = answer["choices"][0]["text"]
                answer = await post(client, TEXT, self._body(prompt, PLANNED_TOKENS, multiverse=PLANNED))
                self.planned.append(answer["choices"][0]["text"])
            (tag,) = (await post(client, "/tokenize", {"prompt": "</Path>"}))["tokens"]
            self._stray = {str(tag): 100}

    async def come(self) -> None:
        """Come for a while, at random times."""
        due = time.monotonic()
        end = due + self.config.seconds
        room = asyncio.Semaphore(self.config.most_at_once)
        weights = [weight for weight, _ in self._kinds]
        async with connect(self.url, timeout=LONGEST_WAIT) as client, asyncio.TaskGroup() as group:
            while time.monotonic() < end:
                due += self.rng.expovariate(self.config.rate)  # by the clock, so that no delay lowers the rate
                await asyncio.sleep(due - time.monotonic())
                await room.acquire()
                ((_, visit),) = self.rng.choices(self._kinds, weights)
                group.create_task(self._visit(visit, client, room))

    async def _visit(self, visit: Any, client: httpx2.AsyncClient, room: asyncio.Semaphore) -> None:
        name = visit.__name__.strip("_")
        self.tally.kinds[name] += 1
        try:
            async with asyncio.timeout(LONGEST_WAIT):
                await visit(client)
        except TimeoutError:
            self.tally.hangs += 1
            self.tally.wrong.append(f"{name} hung")
        except ServerError as error:
            self._status(name, error.status, 429)
        except Exception as error:
            self.tally.wrong.append(f"{name}: {error!r}")
        finally:
            room.release()

    def _status(self, name: str, found: int, *allowed: int) -> None:
        self.tally.statuses[str(found)] += 1
        if found not in allowed:
            self.tally.wrong.append(f"{name}: status {found}")

    def _body(self, number: int, length: int, **fields: Any) -> dict[str, Any]:
        return {"prompt": PROMPTS[number], "max_tokens": length, "temperature": 0, **fields}

    def _any(self) -> tuple[dict[str, Any], str]:
        prompt, (length,) = self.rng.randrange(len(PROMPTS)), self.rng.choices(LENGTHS, WEIGHTS)
        return self._body(prompt, length), self.expected[prompt, length]

    def _compare(self, name: str, found: str, expected: str) -> None:
        self.tally.compared += 1
        self._status(name, 200, 200)
        if found != expected:
            self.tally.wrong.append(f"{name}: another answer: {found!r} instead of {expected!r}")

    async def _whole(self, client: httpx2.AsyncClient) -> None:
        body, expected = self._any()
        answer = await post(client, TEXT, body)
        self._compare("whole", answer["choices"][0]["text"], expected)

    async def _several(self, client: httpx2.AsyncClient) -> None:
        """Two prompts in one request."""
        (one, first), (two, second) = self._any(), self._any()
        length = one["max_tokens"]
        if length != two["max_tokens"]:
            two, second = one, first
        answer = await post(client, TEXT, one | {"prompt": [one["prompt"], two["prompt"]]})
        for choice, expected in zip(answer["choices"], (first, second), strict=True):
            self._compare("several", choice["text"], expected)

    async def _streamed(self, client: httpx2.AsyncClient) -> None:
        body, expected = self._any()
        text = "".join([chunk["choices"][0]["text"] async for chunk in stream(client, TEXT, body)])
        self._compare("streamed", text, expected)

    async def _slow(self, client: httpx2.AsyncClient) -> None:
        body, expected = self._any()
        text = ""
        async for chunk in stream(client, TEXT, body):
            text += chunk["choices"][0]["text"]
            await asyncio.sleep(0.05)
        self._compare("slow", text, expected)

    async def _cancelled(self, client: httpx2.AsyncClient) -> None:
        """A stream that its reader closes after some chunks."""
        count = 0
        chunks = stream(client, TEXT, self._body(self.rng.randrange(3), 400, multiverse={"stream_mode": "branches"}))
        async with contextlib.aclosing(chunks) as reading:  # type: ignore[type-var]
            async for _ in reading:
                count += 1
                if count > 20:
                    break

    async def _left(self, client: httpx2.AsyncClient) -> None:
        """A client that goes away before its whole answer is there."""
        body = self._body(self.rng.randrange(3), 400)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.rng.random()):
                await post(client, TEXT, body)

    async def _malformed(self, client: httpx2.AsyncClient) -> None:
        rng = self.rng
        broken: list[bytes | dict[str, Any]] = [
            rng.randbytes(rng.randint(1, 300)),
            json.dumps(self._body(0, 4)).encode()[: rng.randint(1, 40)],
            b"[" * 50_000,
            b'{"prompt": "a", "temperature": NaN}',
            self._body(0, -1),
            self._body(0, 4, temperature=rng.choice([-1, "hot", True, 1e999])),
            self._body(0, 4, n=rng.choice([0, 17, 10**9])),
            self._body(0, 4, prompt=rng.choice([[], "", [[]], [10**9], None, {"a": 1}])),
            self._body(0, 10**7),
            self._body(0, 4, stop=["x"] * 100),
            self._body(0, 4, best_of=7),
        ]
        body = rng.choice(broken)
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        response = await client.post(TEXT, content=content)
        # What only the engine can refuse may find the queue full.
        self._status("malformed", response.status_code, 400, 429)
        if set(response.json()) != {"message", "error"}:
            self.tally.wrong.append(f"malformed: {response.text[:100]}")

    async def _plans(self, client: httpx2.AsyncClient) -> None:
        """An answer that forks because its client says so."""
        prompt = self.rng.randrange(len(PROMPTS))
        answer = await post(client, TEXT, self._body(prompt, PLANNED_TOKENS, multiverse=PLANNED))
        self._compare("plans", answer["choices"][0]["text"], self.planned[prompt])

    async def _breaks(self, client: httpx2.AsyncClient) -> None:
        """An answer that breaks the grammar, which its client wants to be an error."""
        body = self._body(0, 60, logit_bias=self._stray, multiverse={"on_malformed": "error"})
        response = await client.post(TEXT, json=body)
        self._status("breaks", response.status_code, 422, 429)

    async def _asks(self, client: httpx2.AsyncClient) -> None:
        path, status = self.rng.choice(
            [("/health/ready", 200), ("/health/live", 200), ("/metrics", 200), ("/v1/models", 200), ("/none", 404)]
        )
        response = await client.get(path)
        self._status(f"asks {path}", response.status_code, status)


async def soak(config: SoakConfig) -> dict[str, Any]:
    """The report. `ok` says whether all held.

    Raises:
        GenerationError: the server did not start.
    """
    options = {
        "load": config.load,
        "engine.num-pages": config.num_pages,
        "engine.debug": "true",
        "limits.max-queued": config.max_queued,
    }
    async with local_server(options) as (url, process):
        clients = Clients(config, url)
        await clients.learn()
        start = time.monotonic()
        await clients.come()
        seconds = time.monotonic() - start
        rest = await _settled(url)
        memory = {name: round(usage / 2**20) for name, usage in _memory(process).items()}
        death = await _kill_one(url, process)
    async with local_server({"load": config.load, "tensor-model-parallel-size": 2}) as (url, process):
        rank_death = await _kill_one(url, process)
    tally = clients.tally
    report = {
        "seconds": round(seconds, 1),
        "requests": sum(tally.kinds.values()),
        "kinds": dict(tally.kinds),
        "statuses": dict(tally.statuses),
        "answers_compared": tally.compared,
        "hangs": tally.hangs,
        "wrong": tally.wrong[:20],
        "num_wrong": len(tally.wrong),
        "pages_missing_in_the_end": config.num_pages - rest["pages_free"],
        "answers_left_in_the_end": rest["queue"],
        "preemptions": rest["preemptions"],
        "memory_mib": memory,
        "engine_killed": death,
        "one_of_two_ranks_killed": rank_death,
    }
    held = not tally.wrong and not tally.hangs and rest["queue"] == 0 and rest["pages_free"] == config.num_pages
    return report | {"ok": held and death["ok"] and rank_death["ok"] and rest["preemptions"] > 0}


async def _settled(url: str) -> dict[str, int]:
    """What /metrics says once nothing runs, or after a while."""
    names = {
        "queue": "multiverse_queue ",
        "pages_free": "multiverse_cache_pages_free ",
        "preemptions": "multiverse_preemptions_total ",
    }
    found: dict[str, int] = {}
    async with connect(url) as client:
        for _ in range(60):
            await asyncio.sleep(1)
            lines = (await client.get("/metrics")).text.splitlines()
            found = {
                name: int(float(next(line for line in lines if line.startswith(text)).split()[1]))
                for name, text in names.items()
            }
            if found["queue"] == 0:
                await asyncio.sleep(2)  # for the next beat of the engine
                return found
    return found


def _memory(process: psutil.Process) -> dict[str, int]:
    (engine,) = process.children()
    return {"http": process.memory_info().rss, "engine": engine.memory_info().rss}


async def _kill_one(url: str, process: psutil.Process) -> dict[str, Any]:
    """Kill the last rank of the engine while clients wait: how long until they hear, and what."""
    body = {"prompt": PROMPTS[0], "max_tokens": 400, "temperature": 0, "ignore_eos": True}

    async def wait(client: httpx2.AsyncClient, streams: bool) -> str:
        try:
            if streams:
                async for _ in stream(client, TEXT, body):
                    pass
            else:
                await post(client, TEXT, body)
        except ServerError as error:
            return "error event" if error.status == 0 else str(error.status)
        return "answered"

    async with connect(url, timeout=LONGEST_WAIT) as client:
        waiting = [asyncio.create_task(wait(client, k % 2 == 0)) for k in range(8)]
        await asyncio.sleep(1)
        start = time.monotonic()
        process.children()[-1].kill()
        heard = Counter(await asyncio.gather(*waiting))
        seconds = time.monotonic() - start
        ready = (await client.get("/health/ready")).status_code
    ok = seconds < 10 and ready == 503 and set(heard) <= {"503", "error event"}
    return {"seconds_until_all_heard": round(seconds, 3), "heard": dict(heard), "ready_after": ready, "ok": ok}
