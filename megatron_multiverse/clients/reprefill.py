"""Parallel blocks through any server with OpenAI's completions: what tools/serve_by_reprefill.py does.

A server that knows nothing of branches decodes each of them as a request of its own: a path is a request whose prompt
ends with its label, and the conclusion is one whose prompt holds all paths. The server reads those prompts anew, as far
as its prefix cache does not have them.

The model then reads paths one after the other: a path's own tokens are right, but the conclusion sees path 2 after
path 1, at later positions, and computed with path 1 in sight. That is not the mask that a Multiverse model was trained
with. docs/serving.md says how far its log-probabilities move.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2

from megatron_multiverse.clients.http import connect, post, served_model
from megatron_multiverse.clients.prompts import read_prompts
from megatron_multiverse.config.choices import FreeText
from megatron_multiverse.errors import ConfigError
from megatron_multiverse.structure import StructureMachine
from megatron_multiverse.structure.frames import Event
from megatron_multiverse.structure.tags import MAX_DEPTH, Tag
from megatron_multiverse.structure.trajectory import lex

END_GOAL, END_PATH = Tag.END_GOAL.text, Tag.END_PATH.text
MOST_PATHS = 64
"""Goals with more outlines stay plain text."""


@dataclass(frozen=True, kw_only=True)
class ReprefillConfig:
    """What is asked, and of whom."""

    url: str = "http://127.0.0.1:8000"
    """Base of a server with OpenAI's /v1/completions, such as vLLM or SGLang, without /v1. Its key stands in the
    environment variable MULTIVERSE_API_KEY."""
    model: str | None = None
    """Name to send; by default the first of /v1/models."""
    prompt: FreeText | None = None
    """Ask this, and print the answer."""
    input: Path | None = None
    """JSON Lines with a field "prompt" each, instead of --prompt; answers come as JSON Lines."""
    output: Path | None = None
    """File for the answers to --input; by default they are printed."""
    max_tokens: int = 2048
    """Most tokens of an answer, those of all branches; a fork splits what is left evenly."""
    temperature: float = 0.0
    """0 is greedy."""
    top_p: float = 1.0
    """1 is off."""
    seed: int | None = None
    """Sent along, if given; what it means is the server's affair."""
    extra_body: str | None = None
    """JSON object with further fields of every request: '{"multiverse": {"enabled": false}}' for a server of this
    project that is to decode plainly."""
    concurrency: int = 4
    """Answers of --input at once; each has as many requests as it has branches."""

    def __post_init__(self) -> None:
        if (self.prompt is None) == (self.input is None):
            raise ConfigError("give either --prompt TEXT or --input FILE.jsonl")
        for name in ("max_tokens", "concurrency"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        self.fields()

    def fields(self) -> dict[str, Any]:
        """Fields of every request, but for the model.

        Raises:
            ConfigError: extra_body is no JSON object.
        """
        try:
            extra = json.loads(self.extra_body or "{}")
        except ValueError as error:
            raise ConfigError(f"extra_body is no JSON: {error}") from error
        if not isinstance(extra, dict):
            raise ConfigError(f"extra_body must be a JSON object, got {self.extra_body}")
        seed = {} if self.seed is None else {"seed": self.seed}
        return {"temperature": self.temperature, "top_p": self.top_p, **seed, **extra}


@dataclass
class Written:
    """What a branch wrote, its paths and conclusions included."""

    text: str = ""
    tokens: int = 0
    """Generated, as the server counts them."""
    critical_tokens: int = 0
    """On the longest chain."""
    finish_reason: str = "stop"
    prompt_tokens: int = 0
    """Of all requests: what was read anew, or found in the server's cache."""
    cached_tokens: int = 0
    """Those that the server says it found."""
    requests: int = 0

    def add(self, others: list[Written]) -> None:
        """Count paths that ran at the same time."""
        self.tokens += sum(other.tokens for other in others)
        self.critical_tokens += max(other.critical_tokens for other in others)
        self.prompt_tokens += sum(other.prompt_tokens for other in others)
        self.cached_tokens += sum(other.cached_tokens for other in others)
        self.requests += sum(other.requests for other in others)


class Reprefill:
    """Answers through a server that has only plain completions.

    Args:
        client: of the server.
        fields: of every request: model, temperature and the like.
    """

    def __init__(self, client: httpx2.AsyncClient, fields: dict[str, Any]) -> None:
        self._client = client
        # vLLM and SGLang leave special tokens out of the text otherwise, and the tags are special tokens.
        self._fields = fields | {"skip_special_tokens": False, "spaces_between_special_tokens": False}

    async def answer(self, prompt: str, max_tokens: int) -> dict[str, Any]:
        """The answer to a prompt, and what it took.

        Raises:
            ServerError: the server cannot be reached, or refuses.
        """
        start = time.monotonic()
        written = await self._branch(prompt, max_tokens, depth=0)
        row = {name: value for name, value in vars(written).items() if name != "text"}
        row |= {"num_parallel": round(written.tokens / max(1, written.critical_tokens), 4)}
        return {"text": written.text, **row, "seconds": round(time.monotonic() - start, 4)}

    async def _branch(self, before: str, budget: int, depth: int) -> Written:
        """What a branch writes after `before`, which is all that it sees; a path without its `</Path>`."""
        stops = [END_GOAL, END_PATH] if depth else [END_GOAL]
        written = Written()
        for _ in range(budget):  # each request writes something
            if written.tokens >= budget:
                break
            choice = await self._complete(before + written.text, budget - written.tokens, stops, written)
            written.text += choice["text"]
            written.finish_reason = choice["finish_reason"]
            named = choice.get("stop_reason", choice.get("matched_stop"))
            labels = _outlines(written.text + END_GOAL) if depth < MAX_DEPTH else []
            at_goal = named == END_GOAL or (not isinstance(named, str) and bool(labels))
            if written.finish_reason != "stop" or not at_goal:
                break
            written.text += END_GOAL
            if labels:  # else it is plain text, as for the engine
                await self._block(before, written, labels, budget, depth)
        return written

    async def _block(self, before: str, written: Written, labels: list[str], budget: int, depth: int) -> None:
        """Let the paths of a block be written at the same time, and put them into the text."""
        heads = [f"\n{Tag.PATH.text}\n{label}" for label in labels]
        share = max(1, (budget - written.tokens) // len(labels))
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(self._branch(before + written.text + head, share, depth + 1)) for head in heads]
        paths = [task.result() for task in tasks]
        written.add(paths)
        written.text += "".join(head + path.text + END_PATH for head, path in zip(heads, paths, strict=True))
        written.text += f"\n{Tag.CONCLUSION.text}"

    async def _complete(self, prompt: str, max_tokens: int, stop: list[str], written: Written) -> dict[str, Any]:
        body = {"prompt": prompt, "max_tokens": max_tokens, "stop": stop, **self._fields}
        answer = await post(self._client, "/v1/completions", body)
        usage = answer["usage"]
        written.tokens += usage["completion_tokens"]
        written.critical_tokens += usage["completion_tokens"]
        written.prompt_tokens += usage["prompt_tokens"]
        written.cached_tokens += (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
        written.requests += 1
        choice: dict[str, Any] = answer["choices"][0]
        return choice


def _outlines(text: str) -> list[str]:
    """The labels of the outlines where the text ends with the goal of a block; none where it does not."""
    ids, _, vocab = lex(text)
    machine = StructureMachine(vocab, max_paths=MOST_PATHS)
    event = None
    for token in ids:
        event = machine.push(token)
    return [outline.label for outline in machine.outlines] if event is Event.FORK else []


async def answers(config: ReprefillConfig) -> AsyncIterator[dict[str, Any]]:
    """The answers to the prompts of a config, in their order.

    Raises:
        ServerError: the server cannot be reached, or refuses.
        ConfigError: a line of --input has no prompt.
    """
    if config.prompt is not None:
        prompts = [config.prompt]
    else:
        assert config.input is not None
        prompts = read_prompts(config.input)
    room = asyncio.Semaphore(config.concurrency)
    async with connect(config.url) as client:
        model = await served_model(client, config.model)
        engine = Reprefill(client, {"model": model, **config.fields()})

        async def one(prompt: str) -> dict[str, Any]:
            async with room:
                return {"prompt": prompt, **await engine.answer(prompt, config.max_tokens)}

        tasks = [asyncio.create_task(one(prompt)) for prompt in prompts]
        try:
            for task in tasks:
                yield await task
        finally:
            for task in tasks:
                task.cancel()
