"""A local server with those endpoints of Anthropic's API that the curator uses, for the vendor's real SDK to talk to.

It checks bodies against the SDK's own types (an unknown key is a 400, as there), bills as the API does, answers from
scripts, and fails in all the ways a provider fails. It counts what it has delivered whole, so that tests can tell
whether anything was paid twice.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import random
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

from anthropic.types.message_count_tokens_params import MessageCountTokensParams
from anthropic.types.message_create_params import MessageCreateParamsNonStreaming, MessageCreateParamsStreaming
from anthropic.types.messages.batch_create_params import BatchCreateParams

from tests.unit.curation.http_wire import head, read_request, send, send_error, send_json
from tests.unit.curation.messages import Messages, digest_of, events, stage_of
from tests.unit.curation.scripted import Script
from tests.unit.curation.sdk_types import check_type
from tests.waiting import PATIENCE_S, wait_until

KEY = "sk-ant-secret-of-the-tests"
VERSION = "2026-10-21"
FAULTS = (
    "429", "429_after", "529", "500", "timeout", "drop", "cut_json",
    "refusal", "max_tokens", "context_window", "wrong_structure", "html",
)  # fmt: skip


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
        self.messages = Messages(scripts, thinking_tokens)
        self.faults = faults or Faults()
        self.batch_faults = Faults(batch_faults or {}, self.faults.seed)
        self.latency_s, self.batch_s = latency_s, batch_s
        self.delivered: Counter[str] = Counter()
        self.stages: Counter[str] = Counter()
        self.failed: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()
        self.bodies: list[dict[str, Any]] = []
        self.busy: list[tuple[float, int]] = []
        self.echo_key = False
        self.status: int | None = None
        """Answers every request with this status."""
        self.statuses_before: list[int] = []
        """Of the first answers, before all else."""
        self.lose_next_batch_answer = False
        """The next batch is taken, but its answer is lost."""
        self._tries: Counter[str] = Counter()
        self._batches: dict[str, dict[str, Any]] = {}
        self._numbers = itertools.count(1)
        self._under_way = 0
        self._connections = 0
        self._port = port
        self._loop = asyncio.new_event_loop()
        self._answers = asyncio.Event()
        self._answers.set()
        self._ready = threading.Event()

    def __enter__(self) -> AnthropicServer:
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()
        assert self._ready.wait(PATIENCE_S)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def wait_until_clients_have_left(self) -> None:
        """A killed client's requests are under way here until they are answered; a next client's are not to add up."""
        wait_until(lambda: not self._connections, "all connections are closed")

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """In the block single requests arrive as ever, and none is answered: whoever asks is still at it at the end."""
        self._loop.call_soon_threadsafe(self._answers.clear)
        try:
            yield
        finally:
            self._loop.call_soon_threadsafe(self._answers.set)

    def _serve(self) -> None:
        asyncio.set_event_loop(self._loop)
        server = self._loop.run_until_complete(asyncio.start_server(self._connection, "127.0.0.1", self._port))
        self._port = server.sockets[0].getsockname()[1]
        self._ready.set()
        with contextlib.suppress(RuntimeError):
            self._loop.run_forever()
        server.close()

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._connections += 1
        try:
            with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
                while request := await read_request(reader):
                    if not await self._respond(*request, writer):
                        break
            writer.close()
        finally:
            self._connections -= 1

    async def _respond(
        self, method: str, path: str, headers: dict[str, str], body: bytes, writer: asyncio.StreamWriter
    ) -> bool:
        """Answer one request; False closes the connection."""
        self.calls[f"{method} {path.partition('?')[0]}"] += 1
        if self.statuses_before:
            return await send_error(writer, self.statuses_before.pop(0), "api_error", "starting", {"retry-after": "0"})
        if self.status is not None:
            return await send_error(writer, self.status, "api_error", f"asked with {self._echo(headers)}")
        if headers.get("authorization") != f"Bearer {KEY}":
            return await send_error(writer, 401, "authentication_error", f"invalid key {self._echo(headers)}")
        if headers.get("anthropic-version") != VERSION:
            return await send_error(writer, 400, "invalid_request_error", "anthropic-version")
        if method == "POST" and path == "/v1/messages":
            return await self._message(json.loads(body), writer)
        if method == "POST" and path == "/v1/messages/count_tokens":
            return await self._count(json.loads(body), writer)
        if path.startswith("/v1/messages/batches"):
            return await self._batch(method, path, body, writer)
        return await send_error(writer, 404, "not_found_error", f"no such path {path}")

    def _echo(self, headers: dict[str, str]) -> str:
        return headers.get("authorization", "") if self.echo_key else "a key"

    async def _count(self, body: dict[str, Any], writer: asyncio.StreamWriter) -> bool:
        if reason := check_type(body, MessageCountTokensParams, "body"):
            return await send_error(writer, 400, "invalid_request_error", reason)
        return await send_json(writer, 200, {"input_tokens": self.messages.prompt_tokens(body)})

    async def _message(self, body: dict[str, Any], writer: asyncio.StreamWriter) -> bool:
        kind = MessageCreateParamsStreaming if body.get("stream") else MessageCreateParamsNonStreaming
        if reason := check_type(body, kind, "body"):
            return await send_error(writer, 400, "invalid_request_error", reason)
        self.bodies.append(body)
        digest = digest_of(body)
        self._tries[digest] += 1
        fault = self.faults.choose(digest, self._tries[digest])
        self.failed[fault] += bool(fault)
        self._count_busy(+1)
        try:
            await asyncio.sleep(self.latency_s)
            await self._answers.wait()
            return await self._answer(body, digest, fault, writer)
        finally:
            self._count_busy(-1)

    def _count_busy(self, change: int) -> None:
        self._under_way += change
        self.busy.append((time.monotonic(), self._under_way))

    async def _answer(self, body: dict[str, Any], digest: str, fault: str, writer: asyncio.StreamWriter) -> bool:
        if fault in ("429", "429_after"):
            after = {"retry-after": "0.05"} if fault == "429_after" else {}
            return await send_error(writer, 429, "rate_limit_error", "slow down", {"retry-after-ms": "20", **after})
        if fault in ("529", "500"):
            kind = {"529": "overloaded_error", "500": "api_error"}[fault]
            return await send_error(writer, int(fault), kind, "again", {"retry-after-ms": "20"})
        if fault == "html":
            return await send(writer, 200, b"<html>proxy</html>", "text/html")
        if fault == "timeout":
            await asyncio.sleep(30)
            return False
        message = self.messages.message(body, digest, fault)
        if isinstance(message, str):
            return await send_error(writer, 400, "invalid_request_error", message)
        if body.get("stream"):
            return await self._stream(message, digest, fault, writer)
        data = json.dumps(message).encode()
        if fault == "drop":
            writer.write(head(200, "application/json", len(data)) + data[: len(data) // 2])
            await writer.drain()
            return False
        if fault == "cut_json":
            return await send(writer, 200, data[: len(data) // 2], "application/json")
        alive = await send(writer, 200, data, "application/json")
        self._note_delivered(digest, body)
        return alive

    async def _stream(self, message: dict[str, Any], digest: str, fault: str, writer: asyncio.StreamWriter) -> bool:
        writer.write(head(200, "text/event-stream", None))
        pieces = list(events(message))
        cut = len(pieces) // 2 if fault in ("drop", "cut_json") else len(pieces)
        writer.writelines(pieces[:cut])
        if cut < len(pieces):
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

    async def _batch(self, method: str, path: str, body: bytes, writer: asyncio.StreamWriter) -> bool:
        name = path.removeprefix("/v1/messages/batches").partition("?")[0].strip("/")
        if not name and method == "POST":
            return await self._create_batch(json.loads(body), writer)
        if not name:
            rows = [self._batch_object(batch) for batch in reversed(self._batches.values())]
            ends = {"first_id": None, "last_id": None, "has_more": False}
            return await send_json(writer, 200, {"data": rows, **ends})
        batch = self._batches.get(name.partition("/")[0])
        if batch is None:
            return await send_error(writer, 404, "not_found_error", f"no batch {name}")
        if name.endswith("/cancel"):
            batch["canceled"] = True
            return await send_json(writer, 200, self._batch_object(batch))
        if name.endswith("/results"):
            return await self._batch_results(batch, writer)
        return await send_json(writer, 200, self._batch_object(batch))

    async def _create_batch(self, body: dict[str, Any], writer: asyncio.StreamWriter) -> bool:
        if reason := check_type(body, BatchCreateParams, "body"):
            return await send_error(writer, 400, "invalid_request_error", reason)
        fault = self.faults.choose(digest_of(body["requests"][0]["custom_id"]), 0)
        if fault in ("429", "529", "500"):
            return await send_error(writer, int(fault), "overloaded_error", "again")
        batch = {"id": f"msgbatch_{next(self._numbers)}", "made": datetime.now(UTC), **body}
        self._batches[batch["id"]] = batch
        for row in body["requests"]:
            self.bodies.append(row["params"])
        if self.lose_next_batch_answer:
            self.lose_next_batch_answer = False
            return False
        return await send_json(writer, 200, self._batch_object(batch))

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
        return await send(writer, 200, data, "application/x-jsonl")

    def _batch_result(self, row: dict[str, Any]) -> dict[str, Any]:
        """Worked out once per batch, and billed then, whether or not anybody fetches it."""
        digest = digest_of(row["params"])
        self._tries[digest] += 1
        fault = self.batch_faults.choose(digest, self._tries[digest])
        self.failed[f"batch {fault}"] += bool(fault)
        result: dict[str, Any] = {"type": fault}
        if fault in ("errored", "invalid"):
            kind = "invalid_request_error" if fault == "invalid" else "api_error"
            error = {"type": kind, "message": "did not work"}
            result = {"type": "errored", "error": {"type": "error", "error": error, "request_id": None}}
        elif not fault or fault in FAULTS:
            message = self.messages.message(row["params"], digest, fault)
            assert isinstance(message, dict), message
            result = {"type": "succeeded", "message": message}
            self._note_delivered(digest, row["params"])
        return {"custom_id": row["custom_id"], "result": result}
