"""Load on a server, and how it bears it: what tools/bench_server.py does.

Closed loop: so many clients, each asking again as soon as it has its answer; for throughput. Open loop: clients come at
random times (Poisson) whether or not others have been served, and their time counts from when they came; for latency.
"""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2

from megatron_multiverse.clients.http import ServerError, connect, post, served_model, stream
from megatron_multiverse.clients.prompts import read_prompts
from megatron_multiverse.errors import ConfigError
from megatron_multiverse.structure import TAGS

QUANTILES = (50, 95, 99)
CONCLUSION_TOKENS = 64
"""After the paths of a forced block."""


@dataclass(frozen=True, kw_only=True)
class LoadConfig:
    """What is asked, and how."""

    url: str = "http://127.0.0.1:5000"
    """Base of the server, without /v1. Its key: environment variable MULTIVERSE_API_KEY."""
    model: str | None = None
    """Name to send; by default the first of /v1/models."""
    concurrency: list[int] = field(default_factory=lambda: [1, 8])
    """Closed loop: clients at once, one measurement for each."""
    rate: list[float] = field(default_factory=list)
    """Open loop: clients a second, one measurement for each."""
    num_requests: int = 32
    """Answers in each measurement."""
    warmup: int = 2
    """Answers before the first one, which do not count."""
    repeats: int = 1
    """Measurements of each case; all are reported."""
    prompt: str = "Work out A = 583 + 967; B = 48 + 76. Think step by step and in parallel before answering."
    """What to ask."""
    prompts: Path | None = None
    """JSON Lines with a field "prompt" each, asked in turn, instead of --prompt."""
    max_tokens: int = 700
    """Of each answer."""
    ignore_eos: bool = False
    """Let every answer get as long as max_tokens; needs a server that has the field."""
    temperature: float = 0.0
    """0 is greedy."""
    max_concurrent_branches: int | None = None
    """1 asks for one branch at a time, to compare; needs this project's server."""
    forced_branches: int = 0
    """Paths of a block that every answer begins with, whatever the weights are, instead of what the model makes of the
    prompt: fixed work, with no trained model; 0 is off. --max-tokens has no effect then; needs this project's
    server."""
    forced_tokens: int = 128
    """Tokens that each of these paths writes."""
    slo_ttft_ms: float = 1000.0
    """Goodput counts answers whose first token came within this time."""
    slo_tpot_ms: float = 50.0
    """And whose tokens took no more than this each, on average."""
    seed: int = 0
    """Of the times at which clients come."""
    output: Path | None = None
    """JSON file for all figures."""

    def __post_init__(self) -> None:
        for name in ("num_requests", "repeats", "concurrency", "rate", "max_tokens"):
            value = getattr(self, name)
            if min([value] if isinstance(value, int) else value, default=1) <= 0:
                raise ConfigError(f"{name} must be above 0, got {value}")
        if self.forced_branches < 0 or self.forced_tokens < 2:
            raise ConfigError(
                "forced_branches must not be negative (0 is off), and forced_tokens at least 2, got "
                f"{self.forced_branches} and {self.forced_tokens}"
            )


@dataclass
class Answer:
    """One answer as its client saw it; times in seconds."""

    came: float
    first: float
    last: float
    tokens: int
    critical: int
    paths: int = 0
    """That the answer forked; known of this project's server where the request has the object `multiverse`."""
    error: str = ""

    @property
    def ttft(self) -> float:
        """Until the first token."""
        return self.first - self.came

    @property
    def tpot(self) -> float:
        """For each token after the first."""
        return (self.last - self.first) / max(1, self.tokens - 1)


async def measure(config: LoadConfig) -> AsyncIterator[dict[str, Any]]:
    """One row of figures for each case and repeat.

    Raises:
        ServerError: the server cannot be reached, or refuses the very first request.
    """
    bodies = list(_bodies(config))
    async with connect(config.url) as client:
        name = await served_model(client, config.model)
        bodies = [body | {"model": name} for body in bodies]
        if config.forced_branches:
            bodies = [await _with_forced_block(client, config, body) for body in bodies]
        for k in range(config.warmup):
            await _ask(client, bodies[k % len(bodies)], strict=True)
        for repeat in range(config.repeats):
            for concurrency in config.concurrency:
                start = time.monotonic()
                answers = await _closed(client, bodies, config.num_requests, concurrency)
                yield _row(config, answers, start, {"concurrency": concurrency, "repeat": repeat})
            for rate in config.rate:
                start = time.monotonic()
                answers = await _open(client, bodies, config.num_requests, rate, random.Random(config.seed + repeat))
                yield _row(config, answers, start, {"rate": rate, "repeat": repeat})


def _bodies(config: LoadConfig) -> Iterator[dict[str, Any]]:
    for prompt in [config.prompt] if config.prompts is None else read_prompts(config.prompts, (str, list)):
        body: dict[str, Any] = {
            "prompt": prompt,
            "max_tokens": config.max_tokens,
            "temperature": config.temperature,
            "stream_options": {"include_usage": True},
        }
        if config.ignore_eos:
            body["ignore_eos"] = True
        if config.max_concurrent_branches is not None:
            body["multiverse"] = {"max_concurrent_branches": config.max_concurrent_branches}
        yield body


async def _with_forced_block(client: httpx2.AsyncClient, config: LoadConfig, body: dict[str, Any]) -> dict[str, Any]:
    """The body, asking for a block of equal paths and a conclusion. No tag but those of the block is drawn, so the work
    is the same whatever the weights are."""

    async def ids(text: str) -> list[int]:
        found: list[int] = (await post(client, "/tokenize", {"prompt": text}))["tokens"]
        return found

    labels = range(1, config.forced_branches + 1)
    outlines = "".join(f"\n<Outline>\n{label}: part\n</Outline>" for label in labels)
    header = f"<Parallel>\n<Goal>{outlines}\n</Goal>"
    forced = len(await ids(header)) + sum([len(await ids(f"\n<Path>\n{label}:")) for label in labels])
    ours = body.get("multiverse", {}) | {"answer_start": header, "branch_max_tokens": config.forced_tokens}
    return body | {
        "max_tokens": forced + config.forced_branches * config.forced_tokens + CONCLUSION_TOKENS,
        "ignore_eos": True,
        "logit_bias": {str(token): -100 for tag in TAGS for token in await ids(tag)},
        "multiverse": ours,
    }


async def _ask(client: httpx2.AsyncClient, body: dict[str, Any], *, strict: bool = False) -> Answer:
    came = time.monotonic()
    answer = Answer(came, came, came, 0, 0)
    blocks: list[dict[str, Any]] = []
    try:
        async for chunk in stream(client, "/v1/completions", body):
            now = time.monotonic()
            if any(choice["text"] for choice in chunk["choices"]):
                answer.first = now if answer.first == came else answer.first
                answer.last = now
            for choice in chunk["choices"]:
                blocks += choice.get("multiverse", {}).get("blocks", [])
            if usage := chunk.get("usage"):
                answer.tokens = usage["completion_tokens"]
                answer.critical = usage.get("critical_tokens", answer.tokens)
    except (ServerError, httpx2.HTTPError) as error:
        if strict:
            raise
        answer.error = str(error) or type(error).__name__
    answer.paths = sum(len(block["branches"]) for block in blocks)
    return answer


async def _closed(
    client: httpx2.AsyncClient, bodies: Sequence[dict[str, Any]], count: int, concurrency: int
) -> list[Answer]:
    waiting = iter([bodies[k % len(bodies)] for k in range(count)])

    async def ask_on() -> list[Answer]:
        return [await _ask(client, body) for body in waiting]

    found = await asyncio.gather(*(ask_on() for _ in range(concurrency)))
    return [answer for answers in found for answer in answers]


async def _open(
    client: httpx2.AsyncClient, bodies: Sequence[dict[str, Any]], count: int, rate: float, rng: random.Random
) -> list[Answer]:
    tasks, due = [], time.monotonic()
    for k in range(count):
        tasks.append(asyncio.create_task(_ask(client, bodies[k % len(bodies)])))
        due += rng.expovariate(rate)  # by the clock, so that no delay lowers the rate
        await asyncio.sleep(due - time.monotonic())
    return list(await asyncio.gather(*tasks))


def _row(config: LoadConfig, answers: Sequence[Answer], start: float, case: dict[str, Any]) -> dict[str, Any]:
    served = [answer for answer in answers if not answer.error]
    seconds = max((answer.last for answer in served), default=start) - start
    tokens = sum(answer.tokens for answer in served)
    good = sum(answer.ttft * 1e3 <= config.slo_ttft_ms and answer.tpot * 1e3 <= config.slo_tpot_ms for answer in served)
    row: dict[str, Any] = case | {
        "answers": len(served),
        "errors": sorted({answer.error for answer in answers if answer.error}),
        "num_errors": len(answers) - len(served),
        "seconds": round(seconds, 3),
        "tokens_per_second": round(tokens / seconds, 1) if seconds else 0.0,
        "answers_per_second": round(len(served) / seconds, 3) if seconds else 0.0,
        "goodput_per_second": round(good / seconds, 3) if seconds else 0.0,
        "num_parallel": round(tokens / max(1, sum(answer.critical for answer in served)), 3),
        "tokens_per_answer": round(tokens / max(1, len(served)), 1),
        "paths_per_answer": round(sum(answer.paths for answer in served) / max(1, len(served)), 2),
    }
    for name, values in {
        "ttft_ms": [answer.ttft * 1e3 for answer in served],
        "tpot_ms": [answer.tpot * 1e3 for answer in served],
        "latency_ms": [(answer.last - answer.came) * 1e3 for answer in served],
    }.items():
        row |= {f"{name}_p{quantile}": round(_quantile(values, quantile), 2) for quantile in QUANTILES}
    return row


def _quantile(values: Sequence[float], percent: int) -> float:
    """With few values the largest ones stand for the high percentiles."""
    if len(values) < 2:
        return values[0] if values else 0.0
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]
