"""The real SDKs against local servers: what they send, and what becomes of every way in which an answer can fail."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import accumulate
from types import SimpleNamespace
from typing import Any, ClassVar

import httpx2
import pytest
from anthropic import APIStatusError
from anthropic.types.message_create_params import MessageCreateParamsNonStreaming

from megatron_multiverse.curation.exchange import Answer, Failure, Request
from megatron_multiverse.curation.providers.anthropic_messages import AnthropicProvider
from megatron_multiverse.curation.providers.openai_chat import OpenAIProvider
from megatron_multiverse.curation.providers.own_server import OwnServer
from megatron_multiverse.curation.providers.protocol import BatchProvider, Provider, ProviderError
from megatron_multiverse.curation.providers.rule_based import RuleBasedProvider
from megatron_multiverse.curation.questions import Questions
from megatron_multiverse.errors import ConfigError
from tests.unit.curation.anthropic_server import KEY, AnthropicServer, Faults
from tests.unit.curation.conftest import MODEL, random_scripts
from tests.unit.curation.scripted import Script
from tests.unit.curation.sdk_types import check_type

SCRIPTS = random_scripts(2)
QUESTIONS = Questions(SCRIPTS[0].chain, "medium", is_cached=True)
OUTLINE = QUESTIONS.outline(1, None)
STREAMED = replace(OUTLINE, max_tokens=40_000)


async def ask(provider: Provider, request: Request) -> Answer | Failure:
    try:
        return await provider.complete(request)
    finally:
        await provider.close()


def anthropic(server: AnthropicServer, **options: Any) -> AnthropicProvider:
    return AnthropicProvider(MODEL, "medium", base_url=server.url, poll_s=0.01, **{"max_retries": 0, **options})


@pytest.mark.parametrize("request_", [OUTLINE, STREAMED], ids=["json", "stream"])
def test_an_answer_is_its_text_without_the_thinking(request_: Request) -> None:
    with AnthropicServer(SCRIPTS) as server:
        answer = asyncio.run(ask(anthropic(server), request_))
    assert isinstance(answer, Answer) and answer.stop == "end" and answer.model == MODEL
    assert json.loads(answer.text) == json.loads(SCRIPTS[0].answer("outline", ""))
    assert answer.usage.thinking > 0 and answer.usage.output > answer.usage.thinking
    assert answer.raw["content"][0]["type"] == "thinking"
    (body,) = server.bodies
    assert body.get("stream", False) is (request_ is STREAMED)
    assert body["output_config"]["effort"] == "medium" and "temperature" not in body


@pytest.mark.parametrize("request_", [OUTLINE, STREAMED], ids=["json", "stream"])
@pytest.mark.parametrize("fault", ["429", "429_after", "529", "500", "drop", "cut_json", "html"])
def test_what_passes_by_is_a_failure_and_the_sdk_tries_again(request_: Request, fault: str) -> None:
    with AnthropicServer(SCRIPTS, faults=Faults({fault: 1.0})) as server:
        answer = asyncio.run(ask(anthropic(server), request_))
        assert isinstance(answer, Failure) and not answer.is_final, answer
        if fault in ("429", "529", "500"):
            asyncio.run(ask(anthropic(server, max_retries=2), request_))
            assert server.calls["POST /v1/messages"] == 1 + 3


def test_a_server_that_does_not_answer_is_a_failure() -> None:
    with AnthropicServer(SCRIPTS, faults=Faults({"timeout": 1.0})) as server:
        answer = asyncio.run(ask(anthropic(server, timeout_s=0.2), OUTLINE))
    assert isinstance(answer, Failure) and not answer.is_final and answer.reason.startswith("APITimeoutError")


@pytest.mark.parametrize(
    ("fault", "stop"),
    [("refusal", "refusal"), ("max_tokens", "max_tokens"), ("context_window", "context_window")],
)
def test_the_ends_of_an_answer_are_told_apart(fault: str, stop: str) -> None:
    with AnthropicServer(SCRIPTS, faults=Faults({fault: 1.0})) as server:
        answer = asyncio.run(ask(anthropic(server), OUTLINE))
    assert isinstance(answer, Answer) and answer.stop == stop
    assert answer.refusal == ("reasoning_extraction: not this one" if fault == "refusal" else "")


@pytest.mark.parametrize("status", [401, 402, 403, 404])
def test_what_no_request_survives_ends_the_run_and_never_shows_the_key(status: int) -> None:
    with AnthropicServer(SCRIPTS) as server:
        server.status, server.echo_key = status, True
        with pytest.raises(ProviderError) as caught:
            asyncio.run(ask(anthropic(server), OUTLINE))
        assert KEY not in str(caught.value) and "[key]" in str(caught.value)
        assert caught.value.__suppress_context__
        server.status = 400
        answer = asyncio.run(ask(anthropic(server), OUTLINE))
    assert isinstance(answer, Failure) and answer.is_final and KEY not in answer.reason


def test_without_a_key_it_says_how_to_set_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.delenv("ANTHROPIC_API_KEY")
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(ConfigError, match="set ANTHROPIC_API_KEY"):
        AnthropicProvider(MODEL, "medium")
    with pytest.raises(ConfigError, match="set OPENAI_API_KEY"):
        OpenAIProvider("m")


def test_tokens_are_counted_by_the_model_and_the_second_stage_reads_the_cache() -> None:
    script = Script(("word " * 2_000, "end"))
    questions = Questions(script.chain, "medium", is_cached=True)
    outline, groups = questions.outline(1, None), questions.groups((), 1, None)

    async def both(server: AnthropicServer) -> tuple[int | None, list[Any]]:
        provider = anthropic(server)
        answers = [await provider.complete(request) for request in (outline, groups)]
        count = await provider.count_tokens(outline)
        await provider.close()
        return count, [answer.usage for answer in answers if isinstance(answer, Answer)]

    with AnthropicServer([script]) as server:
        count, (first, second) = asyncio.run(both(server))
    assert first.cache_write == second.cache_read > 2_000
    assert first.cache_read == second.cache_write == 0
    assert count == first.input + first.cache_write


def test_batches_answer_in_any_order_and_partly() -> None:
    requests = {f"n-{k}": Questions(s.chain, "low", is_cached=False).outline(1, None) for k, s in enumerate(SCRIPTS)}

    async def run(server: AnthropicServer) -> dict[str, Answer | Failure]:
        provider = anthropic(server)
        assert isinstance(provider, BatchProvider) and not isinstance(RuleBasedProvider(), BatchProvider)
        batch = await provider.submit(requests)
        assert await provider.has_ended(batch)
        assert await provider.find("n-", 2, 0.0) == batch
        assert await provider.find("n-", 3, 0.0) is None and await provider.find("m-", 2, 0.0) is None
        found = {name: answer async for name, answer in provider.results(batch)}
        await provider.close()
        return found

    with AnthropicServer(SCRIPTS) as server:
        found = asyncio.run(run(server))
    assert all(isinstance(answer, Answer) and answer.is_batch for answer in found.values()) and len(found) == 2
    for fault, is_final in (("errored", False), ("invalid", True), ("expired", False), ("canceled", False)):
        with AnthropicServer(SCRIPTS, batch_faults={fault: 1.0}) as server:
            found = asyncio.run(run(server))
        assert all(isinstance(answer, Failure) and answer.is_final is is_final for answer in found.values())
        assert not server.delivered


def test_the_server_checks_bodies_as_the_api_does() -> None:
    body = {"model": "m", "max_tokens": 5, "messages": [{"role": "user", "content": "x"}]}
    kind = MessageCreateParamsNonStreaming
    assert check_type(body, kind, "body") is None
    for wrong in ({"temperature": 1.0}, {"max_tokens": "5"}, {"messages": [{"role": "user", "text": "x"}]}):
        assert check_type(body | wrong, kind, "body")
    assert check_type(body | {"output_config": {"effort": "some"}}, kind, "body")
    assert check_type({"model": "m", "max_tokens": 5}, kind, "body") == "body: messages is missing"


class _Chat(BaseHTTPRequestHandler):
    """An OpenAI-compatible server with one answer."""

    answer: ClassVar[dict[str, Any]] = {}
    status: ClassVar[int] = 200
    statuses_before: ClassVar[list[int]] = []
    """Of the first answers, in place of `status`."""
    retry_after: ClassVar[str] = "0"
    latency_s: ClassVar[float] = 0.0
    bodies: ClassVar[list[dict[str, Any]]] = []
    under_way: ClassVar[list[int]] = []

    def do_POST(self) -> None:
        self.bodies.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
        self.under_way.append(1)
        time.sleep(self.latency_s)
        self.under_way.append(-1)
        data = json.dumps(self.answer).encode()
        self.send_response(self.statuses_before.pop(0) if self.statuses_before else self.status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.send_header("retry-after", self.retry_after)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def chat() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Chat)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    server.server_close()


class PacedLoop(asyncio.SelectorEventLoop):
    """Its clock goes on by five seconds with each answer, however long that takes."""

    def __init__(self, answered: Callable[[], int]) -> None:
        self._answered = answered
        super().__init__()

    def time(self) -> float:
        return 5.0 * self._answered()


async def ask_at_once(provider: Provider, count: int) -> list[Answer | Failure]:
    try:
        return await asyncio.gather(*(provider.complete(request) for request in [OUTLINE, STREAMED] * (count // 2)))
    finally:
        await provider.close()


def test_no_more_requests_are_on_the_wire_than_allowed(chat: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Most of them wait for a connection for longer than an answer may take."""
    limits = {"concurrency": 2, "timeout_s": 20.0, "max_retries": 0}
    with AnthropicServer(SCRIPTS, latency_s=0.2) as server:
        with asyncio.Runner(loop_factory=lambda: PacedLoop(lambda: sum(server.delivered.values()))) as runner:
            answers = runner.run(ask_at_once(anthropic(server, **limits), 12))
        assert all(isinstance(answer, Answer) for answer in answers)
        assert max(count for _, count in server.busy) == 2
    monkeypatch.setattr(_Chat, "answer", completion("stop"))
    monkeypatch.setattr(_Chat, "status", 200)
    monkeypatch.setattr(_Chat, "latency_s", 0.2)
    monkeypatch.setattr(_Chat, "under_way", changes := [])
    with asyncio.Runner(loop_factory=lambda: PacedLoop(lambda: changes.count(-1))) as runner:
        answers = runner.run(ask_at_once(OpenAIProvider("m", base_url=chat, **limits), 12))
    assert all(isinstance(answer, Answer) for answer in answers)
    assert max(accumulate(changes)) == 2


def completion(finish: str, **message: Any) -> dict[str, Any]:
    choice = {"index": 0, "finish_reason": finish, "message": {"role": "assistant", "content": "text", **message}}
    usage = {"prompt_tokens": 10, "completion_tokens": 4, "total_tokens": 14}
    return {"id": "1", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice], "usage": usage}


@pytest.mark.parametrize(
    ("answer", "stop"),
    [
        (completion("stop"), "end"),
        (completion("length"), "max_tokens"),
        (completion("content_filter"), "refusal"),
        (completion("stop", refusal="no"), "refusal"),
    ],
)
def test_any_openai_compatible_server_can_be_asked(chat: str, answer: dict[str, Any], stop: str) -> None:
    _Chat.answer, _Chat.status, _Chat.bodies = answer, 200, []
    got = asyncio.run(ask(OpenAIProvider("m", base_url=chat, max_retries=0), OUTLINE))
    assert isinstance(got, Answer) and got.stop == stop and got.text == "text" and got.usage.input == 10
    assert _Chat.bodies[0]["response_format"]["json_schema"]["schema"] == OUTLINE.schema
    assert _Chat.bodies[0]["messages"][1]["content"].startswith(OUTLINE.shared)


@pytest.mark.parametrize(("status", "is_final"), [(400, True), (500, False), (429, False)])
def test_its_failures_are_told_apart(chat: str, status: int, is_final: bool) -> None:
    _Chat.answer, _Chat.status = {"error": {"message": "no"}}, status
    got = asyncio.run(ask(OpenAIProvider("m", base_url=chat, max_retries=0), OUTLINE))
    assert isinstance(got, Failure) and got.is_final is is_final
    _Chat.status = 404
    with pytest.raises(ProviderError, match="check OPENAI_API_KEY"):
        asyncio.run(ask(OpenAIProvider("m", base_url=chat, max_retries=0), OUTLINE))


def test_a_server_of_ones_own_that_starts_is_waited_for(
    chat: str, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    def provider() -> OpenAIProvider:
        return OpenAIProvider("m", base_url=chat, max_retries=0)

    _Chat.answer, _Chat.status, _Chat.bodies = completion("stop"), 200, []
    monkeypatch.setattr(_Chat, "statuses_before", [502, 503])
    assert isinstance(asyncio.run(ask(provider(), OUTLINE)), Answer) and len(_Chat.bodies) == 3
    assert "it answers with status 502; it is asked again for up to 300 s" in caplog.text

    async def ask_twice() -> list[Answer | Failure]:
        one = provider()
        try:
            return [await one.complete(OUTLINE) for _ in range(2)]
        finally:
            await one.close()

    _Chat.bodies.clear()
    _Chat.statuses_before[:] = [200, 503]
    first, second = asyncio.run(ask_twice())  # what passes by later is the caller's, as ever
    assert isinstance(first, Answer) and isinstance(second, Failure) and len(_Chat.bodies) == 2
    monkeypatch.setattr("megatron_multiverse.patience.PATIENCE_S", 0.05)
    _Chat.status = 503
    got = asyncio.run(ask(provider(), OUTLINE))
    assert isinstance(got, Failure) and not got.is_final and "503" in got.reason


def test_an_error_in_the_middle_of_a_stream_stays_what_it_is() -> None:
    """The body of such an answer has been closed, and cannot be read."""

    async def ask_streamed() -> None:
        response = httpx2.Response(
            200, stream=httpx2.ByteStream(b"event: error"), request=httpx2.Request("POST", "http://x")
        )
        await response.aclose()
        fault = APIStatusError("Overloaded", response=response, body=None)

        async def fail() -> None:
            raise fault

        with pytest.raises(APIStatusError) as caught:
            await OwnServer("http://x").ask(fail)
        assert caught.value is fault

    asyncio.run(ask_streamed())


def test_it_is_waited_for_from_its_first_failure_on_and_by_each_request(
    chat: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, pauses = 1000.0, []
    sleep = asyncio.sleep

    async def noted(seconds: float) -> None:
        pauses.append(seconds)
        for _ in range(1000):  # until all that are under way have failed
            if len(pauses) < 8:
                await sleep(0.01)

    monkeypatch.setattr("megatron_multiverse.patience.time", SimpleNamespace(monotonic=lambda: now))
    monkeypatch.setattr("megatron_multiverse.curation.providers.own_server.asyncio.sleep", noted)
    monkeypatch.setattr(_Chat, "retry_after", "soon")  # no number: the pauses are our own
    monkeypatch.setattr(_Chat, "answer", completion("stop"))
    monkeypatch.setattr(_Chat, "status", 200)
    monkeypatch.setattr(_Chat, "statuses_before", [503] * 8)
    monkeypatch.setattr(_Chat, "bodies", [])
    provider = OpenAIProvider("m", base_url=chat, max_retries=0, concurrency=8)
    now += 3600.0  # meanwhile the user was asked whether to begin
    answers = asyncio.run(ask_at_once(provider, 8))
    assert all(isinstance(answer, Answer) for answer in answers) and len(_Chat.bodies) == 16
    assert pauses == [1.0] * 8


@pytest.mark.parametrize("request_", [OUTLINE, STREAMED], ids=["json", "stream"])
def test_a_server_with_anthropics_messages_is_waited_for_alike(
    request_: Request, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megatron_multiverse.patience.SHORTEST_PAUSE_S", 0.01)
    with AnthropicServer(SCRIPTS) as server:

        async def count_and_ask() -> list[Any]:
            """In the order of a run, whose estimate is the first to ask."""
            provider, found = anthropic(server), []
            server.statuses_before[:] = [502, 503]
            found.append(await provider.count_tokens(request_))
            server.statuses_before[:] = [503]
            return [*found, await ask(provider, request_)]

        tokens, later = asyncio.run(count_and_ask())
        assert tokens > 0 and server.calls["POST /v1/messages/count_tokens"] == 3
        assert isinstance(later, Failure) and server.calls["POST /v1/messages"] == 1, "it has answered before"
        server.statuses_before[:] = [502, 503]
        assert isinstance(asyncio.run(ask(anthropic(server), request_)), Answer)
        assert server.calls["POST /v1/messages"] == 1 + 3
        server.statuses_before[:] = [503]
        monkeypatch.setenv("ANTHROPIC_BASE_URL", server.url)
        vendor = AnthropicProvider(MODEL, "medium", max_retries=0)
        assert isinstance(asyncio.run(ask(vendor, request_)), Failure), "a vendor's is no server that starts"
