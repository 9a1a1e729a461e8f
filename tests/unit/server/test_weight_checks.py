"""Trainers that ask whether the weights they send arrive, by SGLang's /weights_checker."""

from __future__ import annotations

import math
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import pytest
import torch
from torch import Tensor, nn

from megatron_multiverse.config import EngineConfig
from megatron_multiverse.model.weights import copy_tensors
from megatron_multiverse.server import weight_groups
from megatron_multiverse.server.rank_model import RankModel
from tests.unit.server.running import Running, running
from tests.unit.server.trainers import NORM, Trainer, text_of, trainer
from tests.unit.server.trainers import folder as folder
from tests.unit.server.trainers import pool as pool
from tests.unit.server.trainers import server as server
from tests.unit.server.trainers import texts as texts
from tests.unit.server.trainers import weights as weights
from tests.waiting import PATIENCE_S, wait_until

OWN_NORM = "decoder.final_layernorm.weight"


def check(server: Running, action: str, **fields: Any) -> httpx2.Response:
    response = server.post("/weights_checker", {"action": action, **fields})
    assert response.json()["success"] == (response.status_code == 200), response.text
    return response


def test_weights_that_were_sent_are_told_from_those_that_were_not(
    server: Running, pool: ThreadPoolExecutor, weights: dict[str, Tensor], texts: tuple[str, str]
) -> None:
    """In the order of slime's and miles' `--check-weight-update-equal`."""
    with trainer(server, pool) as sender:
        assert sender.send(weights, weight_version="1").status_code == 200
        assert check(server, "snapshot").json()["message"] == "noted; the weights are '1'"
        assert check(server, "compare").status_code == 200
        before = server.http.get("/model_info").json()["weights"]
        assert check(server, "reset_tensors", allow_quant_error=False, selector="all").status_code == 200
        info = server.http.get("/model_info").json()
        assert info["weight_version"] == "reset_tensors" and info["weights"] != before
        assert text_of(server) not in texts, "what was computed for the prompt goes, too"
        refused = check(server, "compare")
        assert refused.status_code == 400 and "differ from the snapshot" in refused.json()["message"]
        assert set(refused.json()["error"]) == {"message", "type", "code", "param"}
        rest = {name: tensor for name, tensor in weights.items() if name != NORM}
        assert sender.send(rest, weight_version="1").status_code == 200
        refused = check(server, "compare").json()["message"]
        assert refused == f"1 tensors differ from the snapshot (megatron-core's names): {OWN_NORM}"
        nearly = weights[NORM].clone()
        nearly[-1] = torch.nextafter(nearly[-1], torch.tensor(9.0, dtype=nearly.dtype))
        assert sender.send({NORM: nearly}, weight_version="1").status_code == 200
        assert OWN_NORM in check(server, "compare").json()["message"], "one bit"
        assert sender.send({NORM: weights[NORM]}, weight_version="1").status_code == 200
        assert check(server, "compare").status_code == 200 and text_of(server) == texts[1]


def test_a_part_of_a_matrix_from_before_a_reset_completes_none(
    server: Running, pool: ThreadPoolExecutor, weights: dict[str, Tensor]
) -> None:
    part = "model.layers.0.self_attn.q_proj.weight"
    with trainer(server, pool) as sender:
        sender.send(weights)
        check(server, "snapshot")
        sender.send({part: weights[part]})
        assert "are used once the others" in check(server, "compare").json()["message"]
        assert "are used once the others" not in check(server, "reset_tensors").json()["message"]
        rest = sender.send({name: tensor for name, tensor in weights.items() if name != part})
        assert "2 tensors, e.g. model.layers.0.self_attn.k_proj.weight, are used once" in rest.json()["message"]
        refused = check(server, "compare")
        assert refused.status_code == 400
        assert "1 tensors differ" in refused.json()["message"] and "layers.0.self_attention.linear_qkv" in refused.text


def test_a_reset_that_fails_midway_leaves_no_trace_of_the_old_weights(
    server: Running, pool: ThreadPoolExecutor, texts: tuple[str, str]
) -> None:
    rand, calls = torch.rand, iter(range(5))

    def fail_at_last(*args: Any, **kwargs: Any) -> Tensor:
        if next(calls) == 4:
            raise RuntimeError("no memory")
        return rand(*args, **kwargs)

    prefixes = server.engine.scheduler.places.prefixes
    with trainer(server, pool):
        assert text_of(server) == texts[0] and len(prefixes)
        before = server.http.get("/model_info").json()["weights"]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "rand", fail_at_last)
            refused = check(server, "reset_tensors")
        assert refused.status_code == 400 and "changed in part only" in refused.json()["message"]
        assert "no memory" not in refused.text, "errors that are not ours are told to the log"
        info = server.http.get("/model_info").json()
        assert info["weight_version"] == "partly_changed" and info["weights"] != before
        assert not len(prefixes) and text_of(server) not in texts


def test_weights_that_are_replaced_in_part_have_another_name(
    server: Running, pool: ThreadPoolExecutor, weights: dict[str, Tensor], texts: tuple[str, str]
) -> None:
    def copy_one(given: dict[str, Tensor], target: nn.Module) -> None:
        name = next(iter(given))
        copy_tensors({name: given[name]}, target)
        raise RuntimeError("no memory")

    with trainer(server, pool) as sender:
        before = server.http.get("/model_info").json()["weights"]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(weight_groups, "copy_tensors", copy_one)
            refused = sender.send(weights, weight_version="1")
        assert refused.status_code == 400 and "changed in part only" in refused.json()["message"]
        info = server.http.get("/model_info").json()
        assert info["weight_version"] == "partly_changed" and info["weights"] != before
        assert sender.send(weights, weight_version="1").status_code == 200, "the group stays"
        assert text_of(server) == texts[1]


def test_a_trainer_that_gives_up_does_not_stall_the_server(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """Larger weights than these take longer to read than a client may want to wait."""
    begun, may_end = threading.Event(), threading.Event()

    def read_long(action: str) -> list[str]:
        begun.set()
        assert may_end.wait(PATIENCE_S)
        return []

    monkeypatch.setattr(server.host.control._part, "check", read_long)
    with server.visitor("/weights_checker", {"action": "snapshot"}):
        assert begun.wait(PATIENCE_S)
    server.client._last_heard = -math.inf
    try:
        assert server.http.get("/health/ready").status_code == 200
    finally:
        may_end.set()
    wait_until(lambda: server.client._last_heard > 0, "the engine goes on")
    assert server.http.get("/health/ready").status_code == 200


def test_weights_from_disk_are_checked_and_released_ones_are_not(
    server: Running, pool: ThreadPoolExecutor, texts: tuple[str, str]
) -> None:
    with trainer(server, pool):
        assert server.post("/update_weights_from_disk", {"model_path": "changed"}).status_code == 200
        check(server, "snapshot")
        check(server, "reset_tensors")
        server.wait_until_free()
        assert server.post("/release_memory_occupation", {}).status_code == 200
        assert "resume_memory_occupation" in check(server, "compare").json()["message"]
        assert server.post("/resume_memory_occupation", {"tags": ["weights"]}).status_code == 200
        assert check(server, "compare").status_code == 400, "without an engine, too"
        assert server.post("/update_weights_from_disk", {"model_path": "changed"}).status_code == 200
        assert server.post("/resume_memory_occupation", {}).status_code == 200
        assert check(server, "compare").status_code == 200 and text_of(server) == texts[1]


def test_answers_in_work_keep_their_weights(server: Running, pool: ThreadPoolExecutor, texts: tuple[str, str]) -> None:
    long = {"text": "abc", "sampling_params": {"max_new_tokens": 200, "ignore_eos": True}}
    with server.held_after(5):
        waiting = pool.submit(server.post, "/generate", long)
        server.wait_until_held()
        assert check(server, "snapshot").status_code == 200, "which harms none"
        refused = check(server, "reset_tensors")
        assert refused.status_code == 400 and "answers are in work" in refused.json()["message"]
    assert waiting.result(PATIENCE_S).status_code == 200
    assert check(server, "compare").status_code == 200 and text_of(server) == texts[0]


def test_an_engine_in_fp8_is_compared_as_it_rounds(pool: ThreadPoolExecutor, folder: Path, weights: Any) -> None:
    engine = EngineConfig(max_rows=16, quantization="fp8")
    with running(weights_interface="lo", engine=engine) as server:
        sender = Trainer(server, pool)
        assert sender.send(weights).status_code == 200
        text = text_of(server)
        check(server, "snapshot")
        check(server, "reset_tensors")
        assert check(server, "compare").status_code == 400
        assert sender.send(weights).status_code == 200
        assert check(server, "compare").status_code == 200 and text_of(server) == text
        sender.group.close()


def test_a_compare_needs_a_snapshot_and_a_server_that_takes_weights(tmp_path: Path) -> None:
    with running(weights_root=tmp_path) as server:
        refused = check(server, "compare")
        assert refused.status_code == 400 and "ask for action snapshot before" in refused.json()["message"]
    with running() as closed:
        refused = closed.post("/weights_checker", {"action": "snapshot"})
        assert refused.status_code == 403 and "--weights-root or --weights-interface" in refused.json()["message"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({}, "action"),
        ({"action": "checksum"}, "action"),
        ({"action": "compare", "allow_quant_error": True}, "allow_quant_error"),
        ({"action": "compare", "selector": "draft"}, "selector"),
        ({"action": "compare", "skip_tensor_list": ["norm"]}, "skip_tensor_list"),
    ],
)
def test_what_the_route_does_not_serve(server: Running, fields: dict[str, Any], param: str) -> None:
    refused = server.post("/weights_checker", fields)
    assert refused.status_code == 400 and refused.json()["error"]["param"] == param


class OtherFails:
    """The ranks of two processes, the other of which fails."""

    def any(self, flag: bool) -> bool:
        return True


def test_a_rank_that_fails_fails_the_others(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    part: RankModel = server.host.control._part
    monkeypatch.setattr(part, "ranks", OtherFails())
    assert "failed on another rank" in check(server, "snapshot").json()["message"]
