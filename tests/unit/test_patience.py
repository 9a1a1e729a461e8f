"""Servers that start, restart or load are waited for by whoever talks to one; what does not pass by ends at once."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_multiverse import patience
from megatron_multiverse.clients.chat import ChatConfig, converse
from megatron_multiverse.clients.http import ServerError, connect, served_model
from megatron_multiverse.clients.load import LoadConfig, measure
from megatron_multiverse.clients.reprefill import ReprefillConfig, answers
from megatron_multiverse.errors import GenerationError
from megatron_multiverse.evaluation.backends import ServerBackend
from megatron_multiverse.evaluation.config import EvaluateConfig
from megatron_multiverse.evaluation.samples import Job, Key
from megatron_multiverse.evaluation.tasks import Problem
from megatron_multiverse.patience import BUSY, PATIENCE_S, SHORTEST_PAUSE_S, STARTING, Deadline, Patience
from tests.scripted_server import Said, Scripted, scripted_server

MODELS = {"data": [{"id": "m"}]}
GATEWAY = "<html>Bad Gateway</html>"
DEAD = {"error": {"message": "the engine has ended", "code": "dead"}}


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Scripted]:
    monkeypatch.setattr(patience, "SHORTEST_PAUSE_S", 0.01)
    with scripted_server() as started:
        yield started


async def load(url: str) -> None:
    async for _ in measure(LoadConfig(url=url)):
        pass


async def named(url: str) -> None:
    async for _ in measure(LoadConfig(url=url, model="m")):
        pass


async def reprefill(url: str) -> None:
    async for _ in answers(ReprefillConfig(url=url, prompt="x")):
        pass


async def chat(url: str) -> None:
    await converse(ChatConfig(url=url, prompt="x"))


@pytest.mark.parametrize("client", [load, named, reprefill, chat])
def test_clients_wait_for_a_server_that_starts(server: Scripted, client: Any, caplog: Any) -> None:
    enough: list[Said] = [(400, {"error": {"message": "enough"}})]
    server.script = {
        "/v1/models": [(502, GATEWAY), (503, "starting"), (504, "late"), (200, MODELS)],
        "/health/ready": [(503, {"error": {"message": "the model is being loaded", "code": "loading"}}), (404, "none")],
        "/v1/completions": enough, "/v1/chat/completions": enough,
    }  # fmt: skip
    with pytest.raises(ServerError, match=r"^enough$"):
        asyncio.run(client(server.url))
    assert (server.asked["/v1/models"], server.asked["/health/ready"]) == (4, 2)
    (told,) = [record.getMessage() for record in caplog.records if "asked again" in record.getMessage()]
    assert told == (
        f"{server.url}: /v1/models answers status 502: {GATEWAY}; it is asked again for up to {PATIENCE_S:g} s"
    )


@pytest.mark.parametrize("said", [(401, {"error": {"message": "the key"}}), (500, "oh"), (200, "[]")])
def test_what_does_not_pass_by_ends_at_once(server: Scripted, said: Said) -> None:
    server.script = {"/v1/models": [said]}

    async def ask() -> str:
        async with connect(server.url) as client:
            return await served_model(client)

    with pytest.raises(ServerError):
        asyncio.run(ask())
    assert server.asked["/v1/models"] == 1


def test_an_engine_that_has_died_ends_all_when_they_begin(server: Scripted) -> None:
    server.script = {  # as our server does, which says there alone that it is dead
        "/v1/models": [(200, MODELS)], "/model_info": [(200, {"weights": "abc"})], "/health/ready": [(503, DEAD)],
    }  # fmt: skip
    for client in (load, named, reprefill, chat):
        with pytest.raises(ServerError, match=r"/health/ready answers the engine has ended$"):
            asyncio.run(client(server.url))
    with pytest.raises(GenerationError, match=r"--url .*: /health/ready answers the engine has ended$"):
        ServerBackend(EvaluateConfig(tasks=["a"], url=[server.url]))
    assert server.asked == {"/v1/models": 5, "/health/ready": 5}, "each once, and nothing after it"


def test_what_is_asked_in_the_beginning_has_one_deadline(server: Scripted, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0

    def passes(seconds: float) -> None:
        nonlocal now
        now += 100 * seconds

    async def passes_too(seconds: float) -> None:
        passes(seconds)

    monkeypatch.setattr(patience, "time", SimpleNamespace(monotonic=lambda: now))
    monkeypatch.setattr("time.sleep", passes)
    monkeypatch.setattr("megatron_multiverse.clients.http.asyncio.sleep", passes_too)
    monkeypatch.setattr(patience, "SHORTEST_PAUSE_S", 1.0)  # a hundred seconds by this clock
    script = {"/v1/models": [(503, "soon")] * 2 + [(200, MODELS)], "/health/ready": [(503, "soon")]}
    server.script = script  # type: ignore[assignment]

    async def ask() -> str:
        async with connect(server.url) as client:
            return await served_model(client)

    with pytest.raises(ServerError, match=r"/health/ready .*, still so after 300 s: "):
        asyncio.run(ask())
    assert server.asked == {"/v1/models": 3, "/health/ready": 2}
    server.asked.clear()
    with pytest.raises(GenerationError, match=r"/health/ready .*, still so after 300 s: "):
        ServerBackend(EvaluateConfig(tasks=["a"], url=[server.url]))
    assert server.asked == {"/v1/models": 3, "/health/ready": 2}


def test_a_client_gives_up_in_the_end(server: Scripted, monkeypatch: pytest.MonkeyPatch) -> None:
    server.script = {"/v1/models": [(502, GATEWAY)]}
    monkeypatch.setattr(patience, "PATIENCE_S", 0.05)
    with pytest.raises(
        ServerError, match=r"/v1/models answers status 502: .*, still so after \d+ s: see what keeps it"
    ):
        asyncio.run(load(server.url))
    with pytest.raises(
        GenerationError, match=r"--url .* answers status 502: .*still so after \d+ s: .* the same command"
    ):
        ServerBackend(EvaluateConfig(tasks=["a"], url=[server.url]))


def test_an_evaluation_waits_for_a_proxy_at_each_question(server: Scripted) -> None:
    choice = {"text": "5", "finish_reason": "stop"}
    whole = {"choices": [choice], "usage": {"completion_tokens": 1}}
    choice["multiverse"] = {"critical_tokens": 1, "decode_steps": 1, "blocks": [], "malformed": {}}  # type: ignore[assignment]
    server.script = {
        "/v1/models": [(502, GATEWAY), (200, MODELS)],
        "/health/ready": [(503, "soon"), (200, {})],
        "/model_info": [(502, GATEWAY), (503, "soon"), (504, "late"), (200, {"weights": "abc", "device": "X"})],
        "/v1/completions": [(502, GATEWAY), (200, whole), (504, "no")],
    }  # fmt: skip
    backend = ServerBackend(EvaluateConfig(tasks=["a"], url=[server.url], chat=False, concurrency=1))
    assert (backend.name, backend.settings, backend.device) == ("m", {"weights": "abc"}, "X")
    problem = Problem(task="a", name="1", question="2 + 3", gold="5")
    jobs = [Job(Key("a", "1", "none", None, seed), problem) for seed in (0, 1)]
    found = backend.answers(jobs)
    assert next(found)[1].text == "5"  # type: ignore[union-attr]
    with pytest.raises(GenerationError, match="status 504: no"):  # a proxy that waits less than an answer takes
        next(found)
    assert server.asked["/v1/completions"] == 3


def test_pauses_grow_and_end(monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    now = 1000.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    shared = Patience("server")
    question, pauses = shared.question(), []
    now += 2 * PATIENCE_S  # it begins with the first answer that is waited for
    assert question.given_up(200, "") is None and question.pause(404, "", "") is None
    now += 2 * PATIENCE_S
    while (pause := question.pause(503, "", "is starting")) is not None:
        pauses.append(pause)
        now += pause
    assert pauses[:6] == [1, 2, 4, 8, 16, 30] and sum(pauses) == PATIENCE_S
    assert question.given_up(503, "").startswith(", still so after 300 s: ")
    assert shared.question().pause(503, "", "is starting", "0") == SHORTEST_PAUSE_S > 0
    assert shared.question().pause(503, "", "is starting", "7") == 7
    assert shared.question().pause(503, "", "is starting", "7000") == 30
    assert shared.question().pause(429, "", "is full", "Wed, 21 Oct 2026 07:28:00 GMT") == 1
    assert caplog.text.count("is starting; it is asked again") == 2 and "is full" not in caplog.text
    for status in (200, 400, 401, 404, 500):
        assert shared.question().pause(status, "", "") is None
        assert shared.question().given_up(status, "") is None
    assert shared.question().pause(503, json.dumps(DEAD), "") is None
    assert shared.question().given_up(503, json.dumps(DEAD)) == ""
    assert shared.question(BUSY).pause(504, "", "") is None and BUSY < STARTING


def test_questions_of_one_deadline_have_pauses_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    shared, deadline = Patience("server"), Deadline()
    questions = [shared.question(deadline=deadline) for _ in range(16)]
    assert [question.pause(503, "", "is starting") for question in questions] == [1.0] * 16
    now += PATIENCE_S - 0.25
    assert [question.pause(503, "", "is starting") for question in questions] == [0.25] * 16
    now += 0.25
    assert [question.pause(503, "", "is starting") for question in questions] == [None] * 16
    assert shared.question(deadline=deadline).pause(503, "", "is starting") is None


def test_the_documents_say_how_long() -> None:
    serving, evaluation = (
        " ".join((Path(__file__).parents[2] / "docs" / name).read_text(encoding="utf-8").split())
        for name in ("serving.md", "evaluation.md")
    )
    statuses = [str(status) for status in sorted(STARTING)]
    asked = (
        f"answered with {', '.join(statuses[:-1])} or {statuses[-1]} they ask again for up to {PATIENCE_S:g} s in all"
    )
    assert asked in serving and "from the first such answer on" in serving
    assert f"waits at each problem, for up to {PATIENCE_S:g} s each" in serving
    assert f"waits in the same way for 502 and 503, for up to {PATIENCE_S:g} s in all" in serving
    assert f"for up to {PATIENCE_S:g} s before the first answer" in evaluation
