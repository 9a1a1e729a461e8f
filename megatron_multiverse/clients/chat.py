"""A chat in the terminal, branches side by side: what tools/text_generation_cli.py does."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

from megatron_multiverse.clients.http import connect, served_model, stream
from megatron_multiverse.config.choices import FreeText
from megatron_multiverse.views.terminal import LiveBranches


@dataclass(frozen=True, kw_only=True)
class ChatConfig:
    """Where to, and how answers are drawn."""

    url: str = "http://127.0.0.1:5000"
    """Base of the server, without /v1. Its key: environment variable MULTIVERSE_API_KEY."""
    prompt: FreeText | None = None
    """Ask this and end; by default the lines that are typed are turns of a conversation."""
    max_tokens: int | None = None
    """Of each answer; by default what the model has room for."""
    temperature: float = 0.0
    """0 is greedy."""
    max_concurrent_branches: int | None = None
    """1 decodes path after path."""
    remember: bool = True
    """Send earlier turns along. A model that was trained on single questions is better off without."""


async def answer(config: ChatConfig, messages: list[dict[str, Any]]) -> str:
    """Stream one answer to the terminal, its branches side by side; returns its text.

    Raises:
        ServerError: the server cannot be reached, refused, or broke off.
        httpx2.HTTPError: it broke off.
    """
    body: dict[str, Any] = {
        "messages": messages,
        "temperature": config.temperature,
        "multiverse": {"stream_mode": "branches", "max_concurrent_branches": config.max_concurrent_branches},
    }
    if config.max_tokens is not None:
        body["max_tokens"] = config.max_tokens
    text = ""
    # The view takes ids and asks for their text. Here the texts are there, and stand for the first of their ids.
    view = LiveBranches("".join)  # type: ignore[arg-type]
    async with connect(config.url) as client:
        with view:
            async for chunk in stream(client, "/v1/chat/completions", body):
                for choice in chunk["choices"]:
                    label = choice.get("multiverse", {})
                    if "branch" in label:
                        pieces: Any = [choice["delta"].get("content", ""), *[""] * (label["tokens"] - 1)]
                        view.on_token(0, label["branch"], pieces)
                        text += pieces[0]
                    elif label:
                        facts = label
    print(
        f"-- {facts['critical_tokens']} tokens on the longest chain, num_parallel {facts['num_parallel']:.2f}",
        file=sys.stderr,
    )
    return text


async def converse(config: ChatConfig) -> None:
    """Turns from standard input until it ends.

    Raises:
        ServerError, httpx2.HTTPError: see `answer`.
    """
    async with connect(config.url) as client:
        await served_model(client)
    if config.prompt is not None:
        await answer(config, [{"role": "user", "content": config.prompt}])
        return
    messages: list[dict[str, Any]] = []
    if sys.stdin.isatty():
        print("An empty line or Ctrl-D ends.", file=sys.stderr)
    while line := _turn():
        messages = [*messages, {"role": "user", "content": line}]
        text = await answer(config, messages)
        messages = [*messages, {"role": "assistant", "content": text}] if config.remember else []


def _turn() -> str:
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return ""
