"""Clients leave, queues fill, engines die, servers end: nobody waits for ever, and nothing stays behind."""

from __future__ import annotations

import contextlib
import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from megatron_multiverse.config import EngineConfig
from megatron_multiverse.server.config import LimitConfig
from tests.unit.server.running import PROMPT, Running, running
from tests.waiting import PATIENCE_S, wait_until

LONG = {"prompt": PROMPT, "max_tokens": 2000, "ignore_eos": True, "temperature": 0}


def events(lines: Iterator[str]) -> Iterator[Any]:
    for line in lines:
        if line.startswith("data: "):
            yield line[6:] if line == "data: [DONE]" else json.loads(line[6:])


@pytest.mark.parametrize("body", [LONG, LONG | {"n": 3, "temperature": 1}, LONG | {"stream": True}], ids=str)
def test_a_client_that_leaves_frees_all_branches(server: Running, body: dict[str, Any]) -> None:
    with server.held_after(60):  # well into the first block
        with server.visitor("/v1/completions", body):
            server.wait_until_held()
            assert server.client.num_generations == body.get("n", 1)
        server.host.steps_left = 300  # it ends in one of these, long before it would be complete
        wait_until(lambda: not server.client.num_generations, "the answers have ended")
        assert server.host.steps_left > 0
    server.wait_until_free()
    assert server.post("/v1/completions", {"prompt": "a", "max_tokens": 1}).status_code == 200


def test_others_write_the_same_while_some_leave(server: Running) -> None:
    body = {"prompt": PROMPT, "max_tokens": 900, "temperature": 0}
    alone = server.post("/v1/completions", body).json()["choices"][0]["text"]
    texts: list[str] = []
    threads = [
        threading.Thread(target=lambda: texts.append(server.post("/v1/completions", body).json()["choices"][0]["text"]))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for _ in range(4):
        with server.http.stream("POST", "/v1/completions", json=LONG | {"stream": True}) as stream:
            next(stream.iter_raw())
    for thread in threads:
        thread.join()
    assert texts == [alone] * 3
    server.wait_until_free()


def test_a_full_queue_asks_to_come_later() -> None:
    with running(limits=LimitConfig(max_queued=2)) as server:
        body = LONG | {"stream": True, "n": 2}
        with server.held_after(30), server.http.stream("POST", "/v1/completions", json=body) as stream:
            next(stream.iter_raw())
            for body in (LONG, LONG | {"stream": True}):
                response = server.post("/v1/completions", body)
                assert response.status_code == 429 and response.json()["error"]["code"] == "queue_full"
                assert 1 <= int(response.headers["retry-after"]) <= 120
        server.wait_until_free()
        assert server.post("/v1/completions", LONG | {"max_tokens": 2}).status_code == 200
        for body in ({"n": 3}, {"prompt": [LONG["prompt"]] * 3, "stream": True}):
            response = server.post("/v1/completions", LONG | {"max_tokens": 2} | body)
            assert response.status_code == 400 and "3 answers" in response.json()["error"]["message"], (
                "never, not later"
            )


def test_requests_that_wait_are_in_the_order_of_their_priority() -> None:
    with running(engine=EngineConfig(max_rows=1)) as server, contextlib.ExitStack() as streams:
        streams.enter_context(server.held_after(30))  # the first one stays where it is
        scheduler = server.engine.scheduler
        readers = []  # a reader that is not kept would close its stream
        for number, priority in enumerate((None, 3, 0, -3), 1):
            body = LONG | {"stream": True, "priority": priority}
            stream = streams.enter_context(server.http.stream("POST", "/v1/completions", json=body))
            readers.append(stream.iter_raw())
            next(readers[-1])
            wait_until(lambda n=number: len(scheduler.active) + len(scheduler.waiting) == n, f"{number} are there")
        assert [state.request.priority for state in scheduler.waiting] == [-3, 0, 3]


def test_an_answer_that_takes_too_long_is_cut() -> None:
    with running(limits=LimitConfig(request_timeout=600)) as server, ThreadPoolExecutor() as pool:
        with server.held_after(30):
            future = pool.submit(server.post, "/v1/completions", LONG)
            server.wait_until_held()
            assert not future.done()
            server.skip(600)
            choice = future.result(PATIENCE_S).json()["choices"][0]
        assert choice["finish_reason"] == "abort" and choice["text"].startswith("<Think>")
        server.wait_until_free()


def test_a_dead_engine_fails_all_that_wait_and_the_server_says_so() -> None:
    with running() as server:
        found: dict[str, Any] = {}

        def stream() -> None:
            with server.http.stream("POST", "/v1/completions", json=LONG | {"stream": True}) as response:
                for event in events(response.iter_lines()):
                    found.setdefault("events", []).append(event)

        def whole() -> None:
            found["whole"] = server.post("/v1/completions", LONG)

        threads = [threading.Thread(target=stream), threading.Thread(target=whole)]
        with server.held_after(30):
            for thread in threads:
                thread.start()
            wait_until(lambda: server.client.num_generations == 2, "both are in the making")
            # Until its first event a stream is refused as a whole answer is.
            wait_until(lambda: "events" in found or not threads[0].is_alive(), "the stream has begun")
            server.theirs.shutdown(socket.SHUT_RDWR)  # what a killed process leaves
            for thread in threads:
                thread.join()
        assert found["whole"].status_code == 503 and found["whole"].json()["error"]["code"] == "dead"
        assert found["events"][-1]["error"]["code"] == "dead", "an error, and no [DONE] after it"
        assert server.http.get("/health/ready").status_code == 503
        assert server.http.get("/health/live").status_code == 200
        assert server.post("/v1/completions", LONG).status_code == 503


def test_a_step_that_raises_ends_in_one_error_without_its_text(monkeypatch: pytest.MonkeyPatch) -> None:
    with running() as server:
        launch = server.engine.runner.launch

        def fail(plan: Any) -> Any:
            raise RuntimeError("secret at 0x7f00")

        monkeypatch.setattr(server.engine.runner, "launch", fail)
        response = server.post("/v1/completions", LONG)
        assert response.status_code == 500 and "secret" not in response.text and "0x7f00" not in response.text
        with server.http.stream("POST", "/v1/completions", json=LONG | {"stream": True}) as stream:
            found = list(events(stream.iter_lines()))
        assert found[-1]["error"]["type"] == "internal_server_error" and "secret" not in str(found)
        monkeypatch.setattr(server.engine.runner, "launch", launch)
        assert server.post("/v1/completions", LONG | {"max_tokens": 5}).status_code == 200


def test_an_error_of_the_server_gives_a_number_and_not_its_text(
    server: Running, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*args: Any) -> Any:
        raise RuntimeError("secret")

    monkeypatch.setattr(server.client, "check_room", fail)
    response = server.post("/v1/completions", LONG)
    assert response.status_code == 500 and "secret" not in response.text
    number = response.json()["message"].split()[2].rstrip(";")
    assert number in caplog.text and "secret" in caplog.text


def test_a_squeezed_cache_changes_no_answer(server: Running) -> None:
    body = {"prompt": [PROMPT] * 4, "max_tokens": 700, "temperature": 0, "multiverse": {}}
    expected = server.post("/v1/completions", body).json()["choices"]
    with running(engine=EngineConfig(max_rows=16, num_pages=50)) as small:
        found = small.post("/v1/completions", body).json()["choices"]
        small.wait_until_free()
    assert [choice["text"] for choice in found] == [choice["text"] for choice in expected]
    assert sum(choice["multiverse"]["preemptions"] for choice in found) > 0


def test_metrics_tell_of_answers_branches_and_refusals(server: Running) -> None:
    def value(name: str) -> float:
        lines = server.http.get("/metrics").text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(name))

    names = ["multiverse_blocks_total", "multiverse_branches_total", 'multiverse_tokens_total{kind="generated"}']
    names += [
        'multiverse_http_responses_total{route="/v1/completions",status="400"}',
        'multiverse_http_responses_total{route="/v1/models/{name:path}",status="404"}',
        "multiverse_request_seconds_count",
    ]
    before = {name: value(name) for name in names}
    body = {"prompt": PROMPT, "max_tokens": 900, "temperature": 0}
    usage = server.post("/v1/completions", body).json()["usage"]
    server.post("/v1/completions", {"prompt": 5})
    server.http.get("/v1/models/some/other")
    changes = {name: value(name) - before[name] for name in names}
    assert list(changes.values()) == [1, 2, usage["completion_tokens"], 1, 1, 1]
    server.wait_until_free()
    steps = server.engine.num_steps
    wait_until(lambda: value("multiverse_engine_steps ") == steps, "the engine has told of its last step")
    assert value("multiverse_step_seconds_count") > 0
    assert value("multiverse_engine_up") == 1 and value("multiverse_requests_running") == 0
    assert value("multiverse_cache_pages_free ") == value("multiverse_cache_pages ") == server.engine.book.num_pages
    assert value("multiverse_engine_graph_steps ") == 0, "there are none on a CPU"
    assert 0 < value("multiverse_cache_copied_tokens ") == server.engine.copied_tokens


def test_the_first_token_is_timed_from_the_request_on(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the engine does before it hears of the request counts: a client waits for that, too."""

    def total() -> float:
        lines = server.http.get("/metrics").text.splitlines()
        return next(float(line.split()[1]) for line in lines if "time_to_first_token_seconds_sum" in line)

    handle = server.host._handle

    def handle_late(message: dict[str, Any]) -> None:
        time.sleep(0.5 if message["op"] == "add" else 0)
        handle(message)

    monkeypatch.setattr(server.host, "_handle", handle_late)
    before = total()
    server.post("/v1/completions", {"prompt": PROMPT, "max_tokens": 8, "stream": True})
    assert total() - before >= 0.5


def test_the_dashboard_asks_for_metrics_that_exist(server: Running) -> None:
    text = (Path(__file__).parents[3] / "docs" / "grafana.json").read_text()
    names = set(re.findall(r"multiverse_[a-z_]+", text)) - {"multiverse_"}
    shown = server.http.get("/metrics").text
    assert len(names) > 15
    assert {name for name in names if f"\n{name}" not in shown and f"# TYPE {name}" not in shown} <= {
        "multiverse_malformed_total",  # appears with the first malformed output
    }
