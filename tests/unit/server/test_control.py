"""The engine as a whole, steered as trainers do between rollouts: pause, other weights, memory."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import pytest
import torch

from megatron_multiverse.checkpoints.load import load_checkpoint
from megatron_multiverse.checkpoints.sources import weights_fingerprint
from megatron_multiverse.config import EngineConfig
from megatron_multiverse.model.weights import save_model
from tests.unit.server.running import MODEL, PROMPT, Running, running
from tests.waiting import PATIENCE_S, wait_until

LONG = {"text": PROMPT, "sampling_params": {"max_new_tokens": 300, "temperature": 0, "ignore_eos": True}}
SHORT = {"text": PROMPT, "sampling_params": {"max_new_tokens": 60, "temperature": 0}, "return_logprob": True}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the quickstart's model, slightly changed, and one that is damaged."""
    folder = tmp_path_factory.mktemp("weights")
    model, config = load_checkpoint(MODEL)
    save_model(model, config, folder / "original")
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)) * 0.1)
    save_model(model, config, folder / "changed")
    (folder / "damaged").mkdir()
    (folder / "link").symlink_to(MODEL)
    return folder


@pytest.fixture(scope="module")
def server(root: Path) -> Iterator[Running]:
    with running(weights_root=root) as started:
        yield started


@pytest.fixture(scope="module")
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as made:
        yield made


@contextlib.contextmanager
def asked(server: Running, pool: ThreadPoolExecutor, body: dict[str, Any]) -> Iterator[Future[httpx2.Response]]:
    """Ask in another thread. In the block the engine is in the midst of the answer and does what it is told, but takes
    no step; after it the engine goes on, unless it was told not to."""
    with server.held_after(30):
        future = pool.submit(server.post, "/generate", body)
        server.wait_until_held()
        assert not future.done()
        yield future


def act(server: Running, path: str, body: dict[str, Any] | None = None) -> httpx2.Response:
    response = server.http.post(path, json=body) if body is not None else server.http.post(path)
    assert response.status_code == 200, response.text
    return response


@pytest.mark.parametrize("mode", ["in_place", "retract"])
def test_a_pause_changes_no_answer(server: Running, pool: ThreadPoolExecutor, mode: str) -> None:
    expected = server.post("/generate", SHORT).json()
    with asked(server, pool, SHORT) as waiting:
        assert act(server, "/pause_generation", {"mode": mode}).json()["status"] == "ok"
        steps = server.engine.num_steps
    added = pool.submit(server.post, "/generate", SHORT)
    wait_until(lambda: server.client.num_generations == 2, "both are in the making")
    time.sleep(0.3)  # in which an engine that is not paused takes steps
    assert server.engine.num_steps == steps and not waiting.done() and not added.done()
    flushed = server.http.post("/flush_cache")
    assert flushed.status_code == (400 if mode == "in_place" else 200), "with their cache, or their text alone"
    act(server, "/continue_generation", {})
    for future in (waiting, added):
        assert future.result(PATIENCE_S).json()["output_ids"] == expected["output_ids"]


def test_a_pause_can_end_all_answers_and_clients_may_leave_while_it_lasts(
    server: Running, pool: ThreadPoolExecutor
) -> None:
    with asked(server, pool, LONG) as waiting:
        act(server, "/pause_generation")
        assert waiting.result(PATIENCE_S).json()["meta_info"]["finish_reason"]["type"] == "abort"
    with server.visitor("/generate", LONG):
        wait_until(lambda: server.client.num_generations, "the visitor's answer is asked for")
    server.wait_until_free()
    act(server, "/continue_generation")
    assert server.http.get("/flush_cache").text == "Cache flushed.\n"
    assert server.post("/generate", SHORT).json()["meta_info"]["cached_tokens"] == 0


def test_answers_are_aborted_by_their_name(server: Running, pool: ThreadPoolExecutor) -> None:
    with asked(server, pool, LONG | {"rid": "one"}) as one, asked(server, pool, LONG | {"rid": "two"}) as two:
        act(server, "/abort_request", {"rid": "none"})
        act(server, "/abort_request", {"rid": "one"})
        assert one.result(PATIENCE_S).json()["meta_info"]["finish_reason"]["type"] == "abort" and not two.done()
        act(server, "/abort_request", {"abort_all": True})
        assert two.result(PATIENCE_S).json()["meta_info"]["id"] == "two"
    assert server.post("/abort_request", {}).status_code == 400


def test_other_weights_change_answers_and_the_version_says_so(root: Path, pool: ThreadPoolExecutor) -> None:
    """On a server of its own, whose first weights are in use."""
    with running(weights_root=root) as server:
        assert server.http.get("/model_info").json()["weights"] == weights_fingerprint(MODEL)
        before = server.post("/generate", SHORT).json()
        assert before["meta_info"]["weight_version"] == "default"
        ended = server.post("/generate", SHORT | {"sampling_params": {"max_new_tokens": 300, "temperature": 0}}).json()
        assert ended["meta_info"]["finish_reason"]["matched"] in server.app.state.model.end_ids
        with asked(server, pool, LONG) as waiting:
            update = {"model_path": "changed", "weight_version": "step 1"}
            answer = act(server, "/update_weights_from_disk", update).json()
        assert answer["success"] and answer["num_paused_requests"] == 1
        both = waiting.result(PATIENCE_S).json()
        assert both["meta_info"]["weight_version_names"] == {"0": "default", "1": "step 1"}
        versions = both["multiverse"]["tree"]["weight_versions"]
        assert len(versions) == len(both["output_ids"]) and set(versions) == {0, 1}
        after = server.post("/generate", SHORT).json()
        assert after["text"] != before["text"] and after["meta_info"]["weight_version"] == "step 1"
        info = server.http.get("/model_info").json()
        assert (info["weight_version"], info["weights"]) == ("step 1", weights_fingerprint(root / "changed"))
        act(
            server,
            "/update_weights_from_disk",
            {"model_path": "original", "abort_all_requests": True, "keep_pause": True},
        )
        assert server.http.get("/server_info").json()["paused"]
        act(server, "/continue_generation")
        again = server.post("/generate", SHORT).json()
        assert again["text"] == before["text"] and again["meta_info"]["weight_version"] == "2"


def test_weights_come_from_below_the_root_and_from_nowhere_else(server: Running, root: Path) -> None:
    expected = server.post("/generate", SHORT).json()["text"]
    for path, status in (
        ("..", 403),
        ("link", 403),
        ("/etc", 403),
        ("missing", 400),
        ("damaged", 400),
        ("a\u0000b", 400),
    ):
        response = server.post("/update_weights_from_disk", {"model_path": path})
        assert response.status_code == status and response.json()["error"]["message"], response.text
    for fields in ({"flush_cache": False}, {"load_format": "dummy"}, {"is_async": True}, {"manifest": {"a": 1}}):
        response = server.post("/update_weights_from_disk", {"model_path": "changed", **fields})
        assert response.status_code == 400 and response.json()["error"]["param"] == next(iter(fields))
    assert server.post("/generate", SHORT).json()["text"] == expected, "what was refused changed nothing"
    with running() as closed:
        assert closed.post("/update_weights_from_disk", {"model_path": str(root / "changed")}).status_code == 403


def test_memory_is_given_back_and_taken_again(server: Running, pool: ThreadPoolExecutor) -> None:
    expected = server.post("/generate", SHORT).json()["text"]
    with asked(server, pool, LONG) as waiting:
        refused = server.http.post("/release_memory_occupation")
        assert refused.status_code == 400 and "in work" in refused.json()["message"]
        act(server, "/abort_request", {"abort_all": True})
        waiting.result(PATIENCE_S)
    assert act(server, "/release_memory_occupation").json() == {"released": ["kv_cache", "weights"]}
    assert server.http.get("/health/ready").json()["error"]["code"] == "released"
    assert server.post("/generate", SHORT).status_code == 503
    assert server.post("/update_weights_from_disk", {"model_path": "changed"}).status_code == 400
    act(server, "/resume_memory_occupation", {"tags": ["weights"]})
    act(server, "/update_weights_from_disk", {"model_path": "changed"})
    act(server, "/resume_memory_occupation", {"tags": ["kv_cache"]})
    assert server.post("/generate", SHORT).json()["text"] != expected
    act(server, "/update_weights_from_disk", {"model_path": "original"})
    assert server.post("/generate", SHORT).json()["text"] == expected


def test_a_server_in_fp8_takes_other_weights_and_gives_memory_back(root: Path) -> None:
    engine = EngineConfig(max_rows=16, quantization="fp8")
    with running(weights_root=root, engine=engine) as server:
        before = server.post("/generate", SHORT).json()["text"]
        act(server, "/update_weights_from_disk", {"model_path": "changed"})
        changed = server.post("/generate", SHORT).json()["text"]
        act(server, "/release_memory_occupation")
        act(server, "/resume_memory_occupation")
        assert server.post("/generate", SHORT).json()["text"] == changed != before
        act(server, "/update_weights_from_disk", {"model_path": "original"})
        assert server.post("/generate", SHORT).json()["text"] == before


def test_a_fault_of_the_engine_is_an_answer_too(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **options: Any) -> Any:
        raise RuntimeError("secret")

    monkeypatch.setattr("megatron_multiverse.server.rank_model.load_checkpoint", fail)
    response = server.post("/update_weights_from_disk", {"model_path": "changed"})
    assert response.status_code == 400 and "its log says why" in response.text and "secret" not in response.text


def test_a_dead_engine_fails_those_who_steer_it() -> None:
    with running() as server:
        act(server, "/pause_generation")
        server.theirs.shutdown(socket.SHUT_RDWR)  # what a killed process leaves
        wait_until(lambda: server.client.state == "dead", "its end is noticed")
        assert server.http.post("/continue_generation").status_code == 503
