"""Trainers that send weights to a server: this process, or another one; fixtures for tests of them."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import socket
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_multiverse.errors import RankError
from megatron_multiverse.parallel.outside_group import OutsideGroup
from megatron_multiverse.server.config import LimitConfig
from tests.forked import run_forked
from tests.unit.server.running import MODEL, PROMPT, Running, running
from tests.unit.server.test_tool import ROOT, Tool
from tests.waiting import PATIENCE_S

SHORT = {"text": PROMPT, "sampling_params": {"max_new_tokens": 50, "temperature": 0}}
UPDATE = "/update_weights_from_distributed"
NORM = "model.norm.weight"
SIZE = len(load_file(MODEL / "model.safetensors")[NORM])
GOOD: dict[str, Any] = {"names": [NORM], "dtypes": ["float32"], "shapes": [[SIZE]]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder with the quickstart's model, slightly changed."""
    folder = tmp_path_factory.mktemp("weights") / "changed"
    folder.mkdir()
    for file in MODEL.iterdir():
        if file.suffix == ".json":
            (folder / file.name).write_bytes(file.read_bytes())
    drawn = torch.Generator().manual_seed(0)
    weights = load_file(MODEL / "model.safetensors")
    changed = {n: (t.float() + torch.randn(t.shape, generator=drawn) * 0.1).to(t.dtype) for n, t in weights.items()}
    save_file(changed, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Running]:
    with running(weights_root=folder.parent, weights_interface="lo") as started:
        yield started


@pytest.fixture(scope="module")
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as made:
        yield made


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


class Trainer:
    """Rank 0 of a group with a server of one rank."""

    def __init__(self, server: Running, pool: ThreadPoolExecutor, name: str = "mine") -> None:
        self.server, self.pool, self.name, port = server, pool, name, free_port()
        place = {"master_address": "127.0.0.1", "master_port": port, "rank_offset": 1, "world_size": 2}
        joining = pool.submit(
            server.post, "/init_weights_update_group", place | {"group_name": name, "backend": "gloo"}
        )
        self.group = OutsideGroup("127.0.0.1", port, rank=0, size=2, name=name, backend="gloo", interface="lo")
        answer = joining.result(PATIENCE_S)
        assert answer.status_code == 200 and answer.json()["success"], answer.text

    def announce(self, tensors: dict[str, Tensor], **fields: Any) -> Future[httpx2.Response]:
        dtypes, shapes = [str(t.dtype) for t in tensors.values()], [list(t.shape) for t in tensors.values()]
        body = {"names": list(tensors), "dtypes": dtypes, "shapes": shapes, "group_name": self.name}
        return self.pool.submit(self.server.post, UPDATE, body | fields)

    def send(self, tensors: dict[str, Tensor], **fields: Any) -> httpx2.Response:
        answer = self.announce(tensors, **fields)
        sent = (
            [torch.cat([t.flatten().view(torch.uint8) for t in tensors.values()])] if "load_format" in fields else None
        )
        for tensor in sent or tensors.values():
            try:
                self.group.broadcast(tensor.contiguous(), PATIENCE_S)
            except RankError as error:
                raise AssertionError(answer.result(PATIENCE_S).text) from error
        return answer.result(PATIENCE_S)


@contextlib.contextmanager
def trainer(server: Running, pool: ThreadPoolExecutor) -> Iterator[Trainer]:
    """Joined to the server, whose weights are the original ones again after the block."""
    made = Trainer(server, pool)
    try:
        yield made
    finally:
        made.group.close()
        server.post("/destroy_weights_update_group", {"group_name": made.name})
        back = Trainer(server, pool, "back")
        original = load_file(MODEL / "model.safetensors")
        assert back.send(original, weight_version="default").status_code == 200
        assert server.post("/destroy_weights_update_group", {"group_name": "back"}).json()["success"]
        back.group.close()


@contextlib.contextmanager
def impatient(server: Running, seconds: float) -> Iterator[None]:
    """In the block the server gives trainers so many seconds."""
    state = server.app.state
    usual = state.config
    state.config = dataclasses.replace(usual, limits=LimitConfig(weights_timeout=seconds))
    try:
        yield
    finally:
        state.config = usual


def text_of(server: Running) -> str:
    text: str = server.post("/generate", SHORT).json()["text"]
    return text


@pytest.fixture(scope="module")
def texts(server: Running, pool: ThreadPoolExecutor) -> tuple[str, str]:
    """What the server answers with its own weights, and with the changed ones read from disk."""
    own = text_of(server)
    with trainer(server, pool):
        answer = server.post("/update_weights_from_disk", {"model_path": "changed"})
        assert answer.status_code == 200, answer.text
        changed = text_of(server)
    assert own != changed and text_of(server) == own
    return own, changed


def written(tool: Tool | Running) -> str:
    body = {"prompt": PROMPT, "max_tokens": 50, "temperature": 0}
    text: str = tool.post("/v1/completions", body).json()["choices"][0]["text"]
    return text


def send_as_to_sglang(tool: Tool, ranks: int, folder: Path, backend: str = "gloo") -> str:
    """Five tensors a request, so that matrices come in pieces; what the server said."""
    options = [tool.url, str(free_port()), str(ranks), str(folder), "5", backend]
    environment = os.environ | {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
    done = run_forked("-m", "tests.unit.server.trainer_of_sglang", *options, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
