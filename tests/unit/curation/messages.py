"""The answers of the tests' server as the API words and bills them."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterable
from typing import Any

from tests.unit.curation.scripted import Script

CHARACTERS_PER_TOKEN = 2.7
MIN_CACHED_TOKENS = 512
STAGE_WORDS = {"First task": "outline", "Second task": "groups", "Third task": "rewrite", "Check whether": "judge"}


class Messages:
    """Answers by chain, with what they cost.

    Args:
        scripts: a request about another chain is not answered.
        thinking_tokens: mean number of tokens of thinking that each answer is billed for.
    """

    def __init__(self, scripts: Iterable[Script], thinking_tokens: int) -> None:
        self.scripts = {script.chain.numbered(): script for script in scripts}
        self.thinking_tokens = thinking_tokens
        self._cache: set[str] = set()

    def message(self, body: dict[str, Any], digest: str, fault: str) -> dict[str, Any] | str:
        """The answer to a body, billed; or why the body cannot be answered."""
        shared, task = (part["text"] for part in body["messages"][0]["content"])
        numbered = shared.partition("<text>\n")[2].rpartition("\n</text>")[0]
        script = self.scripts.get(numbered)
        if script is None:
            return "no script for this chain"
        text = script.answer(stage_of(body), task)
        stop, details = "end_turn", None
        if fault == "refusal":
            text, stop = "", "refusal"
            details = {"type": "refusal", "category": "reasoning_extraction", "explanation": "not this one"}
        elif fault == "max_tokens":
            text, stop = text[: len(text) // 2], "max_tokens"
        elif fault == "context_window":
            text, stop = "", "model_context_window_exceeded"
        elif fault == "wrong_structure":
            text = text.replace('"first_line": 1,', '"first_line": 2,').replace("</Conclusion>", "")
            text = text if stage_of(body) != "groups" else '{"steps": [], "groups": [{"kind": "none", "members": []}]}'
        thinking = random.Random(digest).randint(self.thinking_tokens // 2, self.thinking_tokens * 3 // 2)
        return {
            "id": f"msg_{digest[:20]}",
            "type": "message",
            "role": "assistant",
            "model": body["model"],
            "content": [{"type": "thinking", "thinking": "hm", "signature": "s"}, {"type": "text", "text": text}],
            "stop_reason": stop,
            "stop_sequence": None,
            "stop_details": details,
            "usage": self._usage(body, text, thinking),
        }

    def prompt_tokens(self, body: dict[str, Any]) -> int:
        parts = [part["text"] for part in body["messages"][0]["content"]]
        return int(len(body.get("system", "") + "".join(parts)) / CHARACTERS_PER_TOKEN)

    def _usage(self, body: dict[str, Any], text: str, thinking: int) -> dict[str, Any]:
        prompt = self.prompt_tokens(body)
        first = body["messages"][0]["content"][0]
        prefix = body.get("system", "") + json.dumps(body.get("output_config")) + first["text"]
        cached = int(len(first["text"]) / CHARACTERS_PER_TOKEN) if "cache_control" in first else 0
        cached = cached if cached >= MIN_CACHED_TOKENS else 0
        is_hit = digest_of(prefix) in self._cache
        if cached:
            self._cache.add(digest_of(prefix))
        return {
            "input_tokens": prompt - cached,
            "cache_creation_input_tokens": 0 if is_hit else cached,
            "cache_read_input_tokens": cached if is_hit else 0,
            "output_tokens": int(len(text) / CHARACTERS_PER_TOKEN) + thinking,
            "output_tokens_details": {"thinking_tokens": thinking},
            "service_tier": "standard",
        }


def stage_of(body: dict[str, Any]) -> str:
    task = body["messages"][0]["content"][1]["text"]
    return next(stage for words, stage in STAGE_WORDS.items() if task.startswith(words))


def digest_of(value: Any) -> str:
    if isinstance(value, dict):
        value = {name: item for name, item in value.items() if name != "stream"}
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def events(message: dict[str, Any]) -> Iterable[bytes]:
    """A message as the API streams it, one piece of a chunked body for each event."""
    for event in _events(message):
        data = f"event: {event['type']}\ndata: {json.dumps(event)}\n\n".encode()
        yield f"{len(data):x}\r\n".encode() + data + b"\r\n"


def _events(message: dict[str, Any]) -> Iterable[dict[str, Any]]:
    start = {**message, "content": [], "stop_reason": None, "stop_details": None}
    yield {"type": "message_start", "message": start}
    for index, block in enumerate(message["content"]):
        if block["type"] == "thinking":
            yield {"type": "content_block_start", "index": index, "content_block": {**block, "thinking": ""}}
            yield _delta(index, {"type": "thinking_delta", "thinking": block["thinking"]})
        else:
            yield {"type": "content_block_start", "index": index, "content_block": {**block, "text": ""}}
            text = block["text"]
            for k in range(0, len(text), 2_000):
                yield _delta(index, {"type": "text_delta", "text": text[k : k + 2_000]})
        yield {"type": "content_block_stop", "index": index}
    delta = {name: message[name] for name in ("stop_reason", "stop_sequence", "stop_details")}
    yield {"type": "message_delta", "delta": delta, "usage": message["usage"]}
    yield {"type": "message_stop"}


def _delta(index: int, delta: dict[str, Any]) -> dict[str, Any]:
    return {"type": "content_block_delta", "index": index, "delta": delta}
