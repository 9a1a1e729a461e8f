"""A local server with those endpoints of Anthropic's API that the curator uses, for the vendor's real SDK to talk to.

It checks bodies against the SDK's own types (an unknown key is a 400, as there), bills as the API does, answers from
scripts, and fails in all the ways a provider fails. It counts what it has delivered whole, so that tests can tell
whether anything was paid twice.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import itertools
import json
import random
import threading
import time
import typing
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import cache
from typing import Any, NotRequired, Required

from anthropic.types.message_count_tokens_params import MessageCountTokensParams
from anthropic.types.message_create_params import MessageCreateParamsNonStreaming, MessageCreateParamsStreaming
from anthropic.types.messages.batch_create_params import BatchCreateParams
from typing_extensions import is_typeddict

from tests.unit.curation.scripted import Script

KEY = "sk-ant-secret-of-the-tests"
VERSION = "2026-10-21"
CHARACTERS_PER_TOKEN = 2.7
MIN_CACHED_TOKENS = 512
STAGE_WORDS = {"First task": "outline", "Second task": "groups", "Third task": "rewrite", "Check whether": "judge"}
FAULTS = (
    "429", "429_after", "529", "500", "timeout", "drop", "cut_json",
    "refusal", "max_tokens", "context_window", "wrong_structure", "html",
)  # fmt: skip


def check_type(value: Any, kind: Any, place: str) -> str | None:
    """Why the value is not of this type of the SDK; None if it is."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any or kind is object:
        return None
    if origin in (Required, NotRequired, typing.Required, typing.Annotated):
        return check_type(value, arguments[0], place)
    if origin is typing.Literal:
        return None if value in arguments else f"{place}: {value!r} is none of {arguments}"
    if origin in (typing.Union, type(int | None)):
        reasons = [check_type(value, argument, place) for argument in arguments]
        return None if None in reasons else reasons[0]
    if is_typeddict(kind):
        return _check_dict(value, kind, place)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return None if isinstance(value, dict) else f"{place}: an object is expected"
    if isinstance(origin, type) and issubclass(origin, Iterable):
        if not isinstance(value, list):
            return f"{place}: a list is expected"
        items = (check_type(item, arguments[0], f"{place}.{k}") for k, item in enumerate(value))
        return next((reason for reason in items if reason), None)
    if kind is type(None):
        return None if value is None else f"{place}: null is expected"
    if isinstance(kind, type):
        is_right = isinstance(value, kind) and not (kind is int and isinstance(value, bool))
        return None if is_right else f"{place}: {kind.__name__} is expected"
    return None


def _check_dict(value: Any, kind: Any, place: str) -> str | None:
    if not isinstance(value, dict):
        return f"{place}: an object is expected"
    hints = _hints(kind)
    if unknown := value.keys() - hints.keys():
        return f"{place}: unknown key {sorted(unknown)[0]}"
    if missing := {name for name, hint in hints.items() if _is_required(hint)} - value.keys():
        return f"{place}: {sorted(missing)[0]} is missing"
    reasons = (check_type(item, hints[name], f"{place}.{name}") for name, item in value.items())
    return next((reason for reason in reasons if reason), None)


@cache
def _hints(kind: Any) -> dict[str, Any]:
    return typing.get_type_hints(kind, include_extras=True)


def _is_required(hint: Any) -> bool:
    return typing.get_origin(hint) in (Required, typing.Required)


@dataclass
class Faults:
    """How often what goes wrong, by name of `FAULTS`; each request and try has a fault of its own by its hash."""

    rates: Mapping[str, float] = field(default_factory=dict)
    seed: int = 0

    def choose(self, digest: str, attempt: int) -> str:
        """The fault of one try; empty for none."""
        draw = random.Random(f"{self.seed}{digest}{attempt}").random()
        for name, rate in self.rates.items():
            draw -= rate
            if draw < 0:
                return name
        return ""


class AnthropicServer:
    """Use it as a context manager; it runs in a thread of its own.

    Args:
        scripts: answers by chain; a request about another chain is a 400.
        faults: what goes wrong.
        latency_s: seconds that an answer takes.
        batch_s: seconds that a batch takes.
        batch_faults: rates of "errored", "invalid", "expired" and "canceled" among results.
        thinking_tokens: mean number of tokens of thinking that each answer is billed for.

    Attributes:
        delivered: hash of a body -> answers to it that were sent whole and can be used.
        failed: what went wrong, by name.
        busy: (seconds, requests under way) at each change.
    """

    def __init__(
        self,
        scripts: Iterable[Script],
        *,
        faults: Faults | None = None,
        latency_s: float = 0.0,
        batch_s: float = 0.0,
        batch_faults: Mapping[str, float] | None = None,
        thinking_tokens: int = 4_000,
        port: int = 0,
    ) -> None:
        self.scripts = {script.chain.numbered(): script for script in scripts}
        self.faults = faults or Faults()
        self.batch_faults = Faults(batch_faults or {}, self.faults.seed)
        self.latency_s, self.batch_s, self.thinking_tokens = latency_s, batch_s, thinking_tokens
        self.delivered: Counter[str] = Counter()
        self.stages: Counter[str] = Counter()
        self.failed: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()
        self.bodies: list[dict[str, Any]] = []
        self.busy: list[tuple[float, int]] = []
        self.echo_key = False
        self.status: int | None = None
        """Answers every request with this status."""
        self.lose_next_batch_answer = False
        """The next batch is taken, but its answer is lost."""
        self._tries: Counter[str] = Counter()
        self._cache: set[str] = set()
        self._batches: dict[str, dict[str, Any]] = {}
        self._numbers = itertools.count(1)
        self._under_way = 0
        self._port = port
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()

    def __enter__(self) -> AnthropicServer:
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()
        assert self._ready.wait(10)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def _serve(self) -> None:
        asyncio.set_event_loop(self._loop)
        server = self._loop.run_until_complete(asyncio.start_server(self._connection, "127.0.0.1", self._port))
        self._port = server.sockets[0].getsockname()[1]
        self._ready.set()
        with contextlib.suppress(RuntimeError):
            self._loop.run_forever()
        server.close()

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            while request := await _read_request(reader):
                if not await self._respond(*request, writer):
                    break
        writer.close()

    async def _respond(
        self, method: str, path: str, headers: dict[str, str], body: bytes, writer: asyncio.StreamWriter
    ) -> bool:
        """Answer one request; False closes the connection."""
        self.calls[f"{method} {path.partition('?')[0]}"] += 1
        if self.status is not None:
            return await _send_error(writer, self.status, "api_error", f"asked with {self._echo(headers)}")
        if headers.get("authorization") != f"Bearer {KEY}":
            return await _send_error(writer, 401, "authentication_error", f"invalid key {self._echo(headers)}")
        if headers.get("anthropic-version") != VERSION:
            return await _send_error(writer, 400, "invalid_request_error", "anthropic-version")
        if method == "POST" and path == "/v1/messages":
            return await self._message(json.loads(body), writer)
        if method == "POST" and path == "/v1/messages/count_tokens":
            return await self._count(json.loads(body), writer)
        if path.startswith("/v1/messages/batches"):
            return await self._batch(method, path, body, writer)
        return await _send_error(writer, 404, "not_found_error", f"no such path {path}")

    def _echo(self, headers: dict[str, str]) -> str:
        return headers.get("authorization", "") if self.echo_key else "a key"

    async def _count(self, body: dict[str, Any], writer: asyncio.StreamWriter) -> bool:
        if reason := check_type(body, MessageCountTokensParams, "body"):
            return await _send_error(writer, 400, "invalid_request_error", reason)
        return await _send_json(writer, 200, {"input_tokens": self._prompt_tokens(body)})

    async def _message(self, body: dict[str, Any], writer: asyncio.StreamWriter) -> bool:
        kind = MessageCreateParamsStreaming if body.get("stream") else MessageCreateParamsNonStreaming
        if reason := check_type(body, kind, "body"):
            return await _send_error(writer, 400, "invalid_request_error", reason)
        self.bodies.append(body)
        digest = _digest(body)
        self._tries[digest] += 1
        fault = self.faults.choose(digest, self._tries[digest])
        self.failed[fault] += bool(fault)
        self._count_busy(+1)
        try:
            await asyncio.sleep(self.latency_s)
            return await self._answer(body, digest, fault, writer)
        finally:
            self._count_busy(-1)

    def _count_busy(self, change: int) -> None:
        self._under_way += change
        self.busy.append((time.monotonic(), self._under_way))

    async def _answer(self, body: dict[str, Any], digest: str, fault: str, writer: asyncio.StreamWriter) -> bool:
        if fault in ("429", "429_after"):
            after = {"retry-after": "0.05"} if fault == "429_after" else {}
            return await _send_error(writer, 429, "rate_limit_error", "slow down", {"retry-after-ms": "20", **after})
        if fault in ("529", "500"):
            kind = {"529": "overloaded_error", "500": "api_error"}[fault]
            return await _send_error(writer, int(fault), kind, "again", {"retry-after-ms": "20"})
        if fault == "html":
            return await _send(writer, 200, b"<html>proxy</html>", "text/html")
        if fault == "timeout":
            await asyncio.sleep(30)
            return False
        message = self.message(body, digest, fault)
        if isinstance(message, str):
            return await _send_error(writer, 400, "invalid_request_error", message)
        if body.get("stream"):
            return await self._stream(message, digest, fault, writer)
        data = json.dumps(message).encode()
        if fault == "drop":
            writer.write(_head(200, "application/json", len(data)) + data[: len(data) // 2])
            await writer.drain()
            return False
        if fault == "cut_json":
            return await _send(writer, 200, data[: len(data) // 2], "application/json")
        alive = await _send(writer, 200, data, "application/json")
        self._note_delivered(digest, body)
        return alive

    async def _stream(self, message: dict[str, Any], digest: str, fault: str, writer: asyncio.StreamWriter) -> bool:
        writer.write(_head(200, "text/event-stream", None))
        events = list(_events(message))
        cut = len(events) // 2 if fault in ("drop", "cut_json") else len(events)
        for event in events[:cut]:
            data = f"event: {event['type']}\ndata: {json.dumps(event)}\n\n".encode()
            writer.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
        if cut < len(events):
            await writer.drain()
            return False
        writer.write(b"0\r\n\r\n")
        await writer.drain()
        self._note_delivered(digest, None)
        return True

    def _note_delivered(self, digest: str, body: dict[str, Any] | None) -> None:
        self.delivered[digest] += 1
        if body is not None:
            self.stages[stage_of(body)] += 1

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

    def _prompt_tokens(self, body: dict[str, Any]) -> int:
        parts = [part["text"] for part in body["messages"][0]["content"]]
        return int(len(body.get("system", "") + "".join(parts)) / CHARACTERS_PER_TOKEN)

    def _usage(self, body: dict[str, Any], text: str, thinking: int) -> dict[str, Any]:
        prompt = self._prompt_tokens(body)
        first = body["messages"][0]["content"][0]
        prefix = body.get("system", "") + json.dumps(body.get("output_config")) + first["text"]
        cached = int(len(first["text"]) / CHARACTERS_PER_TOKEN) if "cache_control" in first else 0
        cached = cached if cached >= MIN_CACHED_TOKENS else 0
        is_hit = _digest(prefix) in self._cache
        if cached:
            self._cache.add(_digest(prefix))
        return {
            "input_tokens": prompt - cached,
            "cache_creation_input_tokens": 0 if is_hit else cached,
            "cache_read_input_tokens": cached if is_hit else 0,
            "output_tokens": int(len(text) / CHARACTERS_PER_TOKEN) + thinking,
            "output_tokens_details": {"thinking_tokens": thinking},
            "service_tier": "standard",
        }

    async def _batch(self, method: str, path: str, body: bytes, writer: asyncio.StreamWriter) -> bool:
        name = path.removeprefix("/v1/messages/batches").partition("?")[0].strip("/")
        if not name and method == "POST":
            return await self._create_batch(json.loads(body), writer)
        if not name:
            rows = [self._batch_object(batch) for batch in reversed(self._batches.values())]
            ends = {"first_id": None, "last_id": None, "has_more": False}
            return await _send_json(writer, 200, {"data": rows, **ends})
        batch = self._batches.get(name.partition("/")[0])
        if batch is None:
            return await _send_error(writer, 404, "not_found_error", f"no batch {name}")
        if name.endswith("/cancel"):
            batch["canceled"] = True
            return await _send_json(writer, 200, self._batch_object(batch))
        if name.endswith("/results"):
            return await self._batch_results(batch, writer)
        return await _send_json(writer, 200, self._batch_object(batch))

    async def _create_batch(self, body: dict[str, Any], writer: asyncio.StreamWriter) -> bool:
        if reason := check_type(body, BatchCreateParams, "body"):
            return await _send_error(writer, 400, "invalid_request_error", reason)
        fault = self.faults.choose(_digest(body["requests"][0]["custom_id"]), 0)
        if fault in ("429", "529", "500"):
            return await _send_error(writer, int(fault), "overloaded_error", "again")
        batch = {"id": f"msgbatch_{next(self._numbers)}", "made": datetime.now(UTC), **body}
        self._batches[batch["id"]] = batch
        for row in body["requests"]:
            self.bodies.append(row["params"])
        if self.lose_next_batch_answer:
            self.lose_next_batch_answer = False
            return False
        return await _send_json(writer, 200, self._batch_object(batch))

    def _batch_object(self, batch: dict[str, Any]) -> dict[str, Any]:
        made = batch["made"]
        has_ended = batch.get("canceled") or datetime.now(UTC) >= made + timedelta(seconds=self.batch_s)
        counts = dict.fromkeys(("processing", "succeeded", "errored", "canceled", "expired"), 0)
        counts["succeeded" if has_ended else "processing"] = len(batch["requests"])
        return {
            "id": batch["id"],
            "type": "message_batch",
            "processing_status": "ended" if has_ended else "in_progress",
            "request_counts": counts,
            "created_at": made.isoformat(),
            "expires_at": (made + timedelta(days=1)).isoformat(),
            "ended_at": datetime.now(UTC).isoformat() if has_ended else None,
            "archived_at": None,
            "cancel_initiated_at": None,
            "results_url": f"{self.url}/v1/messages/batches/{batch['id']}/results" if has_ended else None,
        }

    async def _batch_results(self, batch: dict[str, Any], writer: asyncio.StreamWriter) -> bool:
        if "results" not in batch:
            batch["results"] = [self._batch_result(row) for row in batch["requests"]]
            random.Random(batch["id"]).shuffle(batch["results"])
        data = "".join(json.dumps(row) + "\n" for row in batch["results"]).encode()
        return await _send(writer, 200, data, "application/x-jsonl")

    def _batch_result(self, row: dict[str, Any]) -> dict[str, Any]:
        """Worked out once per batch, and billed then, whether or not anybody fetches it."""
        digest = _digest(row["params"])
        self._tries[digest] += 1
        fault = self.batch_faults.choose(digest, self._tries[digest])
        self.failed[f"batch {fault}"] += bool(fault)
        result: dict[str, Any] = {"type": fault}
        if fault in ("errored", "invalid"):
            kind = "invalid_request_error" if fault == "invalid" else "api_error"
            error = {"type": kind, "message": "did not work"}
            result = {"type": "errored", "error": {"type": "error", "error": error, "request_id": None}}
        elif not fault or fault in FAULTS:
            message = self.message(row["params"], digest, fault)
            assert isinstance(message, dict), message
            result = {"type": "succeeded", "message": message}
            self._note_delivered(digest, row["params"])
        return {"custom_id": row["custom_id"], "result": result}


def stage_of(body: dict[str, Any]) -> str:
    task = body["messages"][0]["content"][1]["text"]
    return next(stage for words, stage in STAGE_WORDS.items() if task.startswith(words))


def _digest(value: Any) -> str:
    if isinstance(value, dict):
        value = {name: item for name, item in value.items() if name != "stream"}
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


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


async def _read_request(reader: asyncio.StreamReader) -> tuple[str, str, dict[str, str], bytes] | None:
    head = await reader.readuntil(b"\r\n\r\n")
    first, *lines = head.decode().split("\r\n")
    method, path, _ = first.split(" ")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines if line)}
    body = await reader.readexactly(int(headers.get("content-length", 0)))
    return method, path, headers, body


def _head(status: int, kind: str, length: int | None, more: Mapping[str, str] | None = None) -> bytes:
    size = "transfer-encoding: chunked" if length is None else f"content-length: {length}"
    lines = [f"HTTP/1.1 {status} X", f"content-type: {kind}", size, "request-id: req_1"]
    lines += [f"{name}: {value}" for name, value in (more or {}).items()]
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


async def _send(
    writer: asyncio.StreamWriter, status: int, data: bytes, kind: str, more: Mapping[str, str] | None = None
) -> bool:
    writer.write(_head(status, kind, len(data), more) + data)
    await writer.drain()
    return True


async def _send_json(writer: asyncio.StreamWriter, status: int, value: Any) -> bool:
    return await _send(writer, status, json.dumps(value).encode(), "application/json")


async def _send_error(
    writer: asyncio.StreamWriter, status: int, kind: str, message: str, more: Mapping[str, str] | None = None
) -> bool:
    value = {"type": "error", "error": {"type": kind, "message": message}, "request_id": "req_1"}
    return await _send(writer, status, json.dumps(value).encode(), "application/json", more)
