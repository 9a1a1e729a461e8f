"""Weights that a trainer sends over a process group; the trainer is this process or, as for SGLang, another one."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_multiverse.config import EngineConfig
from megatron_multiverse.errors import RankError
from megatron_multiverse.parallel.outside_group import OutsideGroup
from tests.forked import run_forked
from tests.unit.server.running import PROMPT, Running, running
from tests.unit.server.test_tool import FENCE, ROOT, Tool, started
from tests.unit.server.trainers import (
    GOOD,
    NORM,
    SHORT,
    UPDATE,
    Trainer,
    free_port,
    send_as_to_sglang,
    text_of,
    trainer,
    written,
)
from tests.unit.server.trainers import folder as folder
from tests.unit.server.trainers import pool as pool
from tests.unit.server.trainers import server as server
from tests.unit.server.trainers import texts as texts
from tests.unit.server.trainers import weights as weights
from tests.waiting import PATIENCE_S

LONG = {"text": PROMPT, "sampling_params": {"max_new_tokens": 300, "temperature": 0, "ignore_eos": True}}


@pytest.fixture(scope="module")
def expected(folder: Path) -> str:
    """What a server writes that is started with the changed weights."""
    with running(load=folder) as server:
        return written(server)


@pytest.mark.parametrize(("tensor", "pipeline"), [(1, 1), (2, 1), (1, 2)])
def test_a_trainer_of_sglangs_kind_sends_a_model_to_all_ranks(
    tensor: int, pipeline: int, folder: Path, expected: str
) -> None:
    sizes = ("--tensor-model-parallel-size", str(tensor), "--pipeline-model-parallel-size", str(pipeline))
    with started("--weights-interface", "lo", *sizes) as tool:
        before = written(tool)
        said = send_as_to_sglang(tool, tensor * pipeline, folder)
        assert "are used once the others of their matrix have come" in said
        assert written(tool) == expected != before
        assert tool.get("/model_info").json()["weight_version"] == "7"
        refused = tool.post(UPDATE, GOOD | {"group_name": "slime-pp_0"})
        assert refused.status_code == 400 and "no group" in refused.json()["message"], "it was left"
        for name in (NORM, "none"):  # a refusal takes no rank out of step
            place = {"master_address": "127.0.0.1", "master_port": 1, "rank_offset": 0, "world_size": 9}
            assert tool.post("/init_weights_update_group", place | {"group_name": name}).status_code == 400
        leave_while_waited_for(tool, tensor * pipeline)
        assert written(tool) == expected
        for action in ("snapshot", "reset_tensors"):
            assert tool.post("/weights_checker", {"action": action}).json()["success"]
        refused = tool.post("/weights_checker", {"action": "compare"})
        assert refused.status_code == 400 and written(tool) != expected, "no rank keeps what it had"
        send_as_to_sglang(tool, tensor * pipeline, folder)
        assert tool.post("/weights_checker", {"action": "compare"}).json()["success"] and written(tool) == expected


def leave_while_waited_for(tool: Tool, ranks: int) -> None:
    """A trainer that goes before it has sent what it announced: all ranks hear of it and stay in step."""
    port, size = free_port(), ranks + 1
    place = {"master_address": "127.0.0.1", "master_port": port, "rank_offset": 1, "world_size": size}
    with ThreadPoolExecutor() as pool:
        joining = pool.submit(tool.post, "/init_weights_update_group", place | {"backend": "gloo"})
        group = OutsideGroup("127.0.0.1", port, rank=0, size=size, backend="gloo", interface="lo")
        assert joining.result(PATIENCE_S).status_code == 200
        receiving = pool.submit(tool.post, UPDATE, GOOD)
        group.close()
        refused = receiving.result(PATIENCE_S)
        assert refused.status_code == 400 and "did not arrive whole" in refused.json()["message"], refused.text


def test_the_trainer_of_the_docs_runs_as_written(server: Running, pool: ThreadPoolExecutor, folder: Path) -> None:
    text = (ROOT / "docs" / "rl.md").read_text(encoding="utf-8")
    (script,) = [code for kind, code in FENCE.findall(text) if kind == "python" and "OutsideGroup" in code]
    with trainer(server, pool):  # after which the server has its own weights again
        script = script.replace("http://127.0.0.1:5000", server.url).replace("29600", str(free_port()))
        script = script.replace('"model/', f'"{folder}/')
        done = run_forked("-c", script)
        assert done.returncode == 0 and "the weights are 'step 1'" in done.stdout, done.stdout + done.stderr
        assert server.http.get("/model_info").json()["weight_version"] == "step 1"


@pytest.mark.parametrize("form", [{}, {"load_format": "flattened_bucket"}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sent_weights_are_those_from_disk(
    server: Running, pool: ThreadPoolExecutor, weights: dict[str, Tensor], texts: tuple[str, str], form: Any, dtype: Any
) -> None:
    old = server.http.get("/model_info").json()["weights"]
    with trainer(server, pool) as sender:
        # What some trainers send beside the weights: the tied embedding under its other name, and an old buffer.
        unused = {"lm_head.weight": torch.zeros_like(weights["model.embed_tokens.weight"])}
        unused |= {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(5)}
        sent = {name: tensor.to(dtype) for name, tensor in (weights | unused).items()}
        answer = sender.send(sent, weight_version="new", **form)
        assert answer.json() == {"success": True, "message": answer.json()["message"]}, "SGLang's shape"
        assert text_of(server) == texts[1]
        info = server.http.get("/model_info").json()
        assert info["weight_version"] == "new" and info["weights"] != old
    assert text_of(server) == texts[0] and server.http.get("/model_info").json()["weights"] != info["weights"]


def test_an_engine_in_fp8_rounds_what_it_gets(pool: ThreadPoolExecutor, folder: Path, weights: Any) -> None:
    engine = EngineConfig(max_rows=16, quantization="fp8")
    with running(weights_root=folder.parent, weights_interface="lo", engine=engine) as server:
        before = text_of(server)
        sender = Trainer(server, pool)
        assert sender.send(weights).status_code == 200
        sent = text_of(server)
        assert server.post("/update_weights_from_disk", {"model_path": "changed"}).status_code == 200
        assert text_of(server) == sent != before
        sender.group.close()


def test_a_matrix_is_used_once_it_is_whole_and_versions_follow_the_names(
    server: Running, pool: ThreadPoolExecutor, weights: dict[str, Tensor], texts: tuple[str, str]
) -> None:
    late = [name for name in weights if "k_proj" in name or "up_proj" in name]
    parts = [{n: t for n, t in weights.items() if "q_proj" in n or "gate_proj" in n}]
    parts.append({n: t for n, t in weights.items() if n not in parts[0] and n not in late})
    with trainer(server, pool) as sender:
        versions = len(server.client.control.versions)
        first = sender.send(parts[0], weight_version="a").json()["message"]
        assert f"{len(parts[0])} tensors, e.g. {next(iter(parts[0]))}, are used once" in first
        assert text_of(server) == texts[0], "nothing is in use yet"
        sender.send(parts[1], weight_version="a")
        assert text_of(server) != texts[0]
        done = sender.send({name: weights[name] for name in late}, weight_version="a").json()["message"]
        assert "are used once" not in done and text_of(server) == texts[1]
        assert server.client.control.versions[versions:] == ("a",)
        assert server.post("/update_weight_version", {"new_version": "b"}).json()["new_version"] == "b"
        assert server.post("/generate", SHORT).json()["meta_info"]["weight_version"] == "b"
        sender.send(parts[1])
        assert server.client.control.versions[versions + 1 :] == (str(versions + 1),)


def test_answers_in_work_go_on_with_the_new_weights_or_end(
    server: Running, pool: ThreadPoolExecutor, weights: dict[str, Tensor]
) -> None:
    with trainer(server, pool) as sender:
        with server.held_after(30):
            waiting = pool.submit(server.post, "/generate", LONG)
            server.wait_until_held()
            assert sender.send(weights, weight_version="new").status_code == 200
        meta = waiting.result(PATIENCE_S).json()["meta_info"]
        assert list(meta["weight_version_names"].values())[-1] == "new" and len(meta["weight_version_names"]) == 2
        with server.held_after(30):
            waiting = pool.submit(server.post, "/generate", LONG)
            server.wait_until_held()
            assert sender.send(weights, abort_all_requests=True).status_code == 200
            assert waiting.result(PATIENCE_S).json()["meta_info"]["finish_reason"]["type"] == "abort"


def test_a_group_of_the_same_name_takes_the_place_of_the_old_one(
    server: Running, pool: ThreadPoolExecutor, weights: dict[str, Tensor], texts: tuple[str, str]
) -> None:
    with trainer(server, pool) as old:
        new = Trainer(server, pool)
        with pytest.raises(RankError, match="has gone"):
            old.group.broadcast(weights["model.norm.weight"], PATIENCE_S)
        assert new.send(weights).status_code == 200 and text_of(server) == texts[1]
        new.group.close()


def test_released_weights_take_none(
    server: Running, pool: ThreadPoolExecutor, weights: dict[str, Tensor], texts: tuple[str, str]
) -> None:
    with trainer(server, pool) as sender:
        server.wait_until_free()
        assert server.post("/release_memory_occupation", {}).status_code == 200
        refused = server.post(UPDATE, GOOD | {"group_name": sender.name})
        assert refused.status_code == 400 and "resume_memory_occupation" in refused.json()["message"]
        assert server.post("/resume_memory_occupation", {"tags": ["weights"]}).status_code == 200
        again = Trainer(server, pool)
        assert again.send(weights).status_code == 200
        assert server.post("/resume_memory_occupation", {}).status_code == 200
        assert text_of(server) == texts[1]
        again.group.close()
