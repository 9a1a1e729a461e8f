"""Trainers that send what is no weight of the model, other bytes than they announce, or nothing: the server goes on."""

from __future__ import annotations

import contextlib
import re
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_multiverse.errors import RankError
from tests.forked import run_forked
from tests.unit.server.running import MODEL, Running, running
from tests.unit.server.test_tool import TOOL
from tests.unit.server.trainers import (
    GOOD,
    NORM,
    SIZE,
    UPDATE,
    free_port,
    impatient,
    text_of,
    trainer,
)
from tests.unit.server.trainers import folder as folder
from tests.unit.server.trainers import pool as pool
from tests.unit.server.trainers import server as server
from tests.unit.server.trainers import texts as texts
from tests.unit.server.trainers import weights as weights
from tests.waiting import PATIENCE_S, wait_until


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"names": ["decoder.final_layernorm.weight"]}, "the model has no 'decoder.final_layernorm.weight'"),
        ({"shapes": [[SIZE // 2]]}, f"is [{SIZE}] here, got [{SIZE // 2}]"),
        ({"dtypes": ["int8"]}, "'int8' is none of float32, bfloat16"),
        ({"dtypes": ["__class__"]}, "'__class__' is none of"),
        ({"names": [NORM] * 2, "dtypes": ["float32"] * 2, "shapes": [[SIZE]] * 2}, "name each tensor once"),
    ],
)
def test_what_is_no_weight_of_the_model_is_refused_and_the_group_left(
    server: Running, pool: ThreadPoolExecutor, texts: tuple[str, str], fields: dict[str, Any], message: str
) -> None:
    """At once: a trainer that has broadcast already hears of it, and no later request takes that for its tensors."""
    with trainer(server, pool) as sender:
        refused = server.post(UPDATE, GOOD | fields | {"group_name": sender.name})
        assert refused.status_code == 400 and not refused.json()["success"] and message in refused.json()["message"]
        with pytest.raises(RankError, match="has gone"):
            sender.group.broadcast(torch.zeros(SIZE), PATIENCE_S)
        again = server.post(UPDATE, GOOD | {"group_name": sender.name})
        assert again.status_code == 400 and "no group 'mine'" in again.json()["message"]
        assert text_of(server) == texts[0]


@pytest.mark.parametrize(
    ("announced", "sent"),
    [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32), (torch.float32, None)],
    ids=["less", "more", "nothing"],
)
def test_other_bytes_than_were_announced_or_none_change_no_weight(
    server: Running, pool: ThreadPoolExecutor, weights: Any, texts: Any, announced: torch.dtype, sent: Any
) -> None:
    """The first tensor comes as it should, and is not used either."""
    first, second = (name for name in weights if name.endswith("layernorm.weight") and "layers.0." in name)
    with trainer(server, pool) as sender, impatient(server, PATIENCE_S if sent else 5):
        answer = sender.announce({first: weights[first].float(), second: weights[second].to(announced)})
        with contextlib.suppress(*() if sent else (RankError,)):  # on a slow machine the server may have left
            sender.group.broadcast(weights[first].float(), PATIENCE_S)
        if sent is not None:
            sender.group.broadcast(weights[second].to(sent), PATIENCE_S)
        refused = answer.result(PATIENCE_S)
        assert refused.status_code == 400 and not refused.json()["success"]
        assert ("another number of bytes" if sent else "did not arrive whole within") in refused.json()["message"]
        assert text_of(server) == texts[0]
        assert "no group" in server.post(UPDATE, GOOD | {"group_name": sender.name}).json()["message"]


def test_a_trainer_that_never_comes_costs_time_alone(server: Running, texts: tuple[str, str]) -> None:
    place = {"master_address": "127.0.0.1", "master_port": free_port(), "rank_offset": 1, "world_size": 2}
    with impatient(server, 0.5):
        refused = server.post("/init_weights_update_group", place | {"backend": "gloo"})
    assert refused.status_code == 400 and "did not meet the others" in refused.json()["message"]
    assert text_of(server) == texts[0]


def test_a_trainer_that_leaves_while_it_is_waited_for(
    server: Running, pool: ThreadPoolExecutor, weights: dict[str, Tensor], texts: tuple[str, str]
) -> None:
    with trainer(server, pool) as sender:
        answer = sender.announce({NORM: weights[NORM]})
        wait_until(lambda: server.client._controls, "the engine is asked")
        assert server.http.get("/health/ready").status_code == 200, "it is not taken for dead meanwhile"
        sender.group.close()
        assert answer.result(PATIENCE_S).status_code == 400
        assert text_of(server) == texts[0]


@pytest.mark.parametrize(
    ("path", "fields", "message"),
    [
        ("init_weights_update_group", {"rank_offset": 0}, "rank_offset 0, world_size 2"),
        ("init_weights_update_group", {"world_size": 1}, "rank_offset 1, world_size 1"),
        ("init_weights_update_group", {"backend": "nccl"}, "nccl is for GPUs"),
        ("init_weights_update_group", {"backend": "mpi"}, "backend"),
        ("init_weights_update_group", {"master_port": 0}, "master_port"),
        ("init_weights_update_group", {"master_address": ""}, "master_address"),
        ("destroy_weights_update_group", {"group_name": "none"}, "no group 'none'"),
        ("update_weights_from_distributed", {"group_name": "none"}, "no group 'none'"),
        ("update_weights_from_distributed", {"names": []}, "0 names, 1 dtypes and 1 shapes"),
        ("update_weights_from_distributed", {"names": NORM}, "names"),
        ("update_weights_from_distributed", {"shapes": [[-1]]}, "shapes"),
        ("update_weights_from_distributed", {"load_format": "npz"}, "load_format"),
        ("update_weight_version", {}, "new_version"),
    ],
)
def test_fields_that_cannot_work_are_named(server: Running, path: str, fields: dict[str, Any], message: str) -> None:
    place = {"master_address": "127.0.0.1", "master_port": 1, "rank_offset": 1, "world_size": 2, "backend": "gloo"}
    good = {"init_weights_update_group": place, "update_weights_from_distributed": GOOD}.get(path, {})
    response = server.post(f"/{path}", good | fields)
    assert response.status_code == 400 and message in response.json()["message"], response.text


def test_a_server_joins_no_group_unless_it_is_told_so(pool: ThreadPoolExecutor) -> None:
    place = {"master_address": "127.0.0.1", "master_port": free_port(), "rank_offset": 1, "world_size": 2}
    with running() as closed:
        refused = closed.post("/init_weights_update_group", place)
        assert refused.status_code == 403 and "--weights-interface" in refused.json()["message"]
    done = run_forked(TOOL, "--load", MODEL, "--weights-interface", "no0")
    assert done.returncode == 1 and re.search("--weights-interface no0: this machine has .*lo", done.stderr)
