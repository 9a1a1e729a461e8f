"""Weights sent to a server on GPUs: over NCCL from another GPU, and over gloo. Needs a GPU for each rank and, for NCCL,
one for the trainer."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_multiverse.parallel.outside_group import OutsideGroup
from tests.unit.server.test_tool import Tool, started
from tests.unit.server.trainers import NORM, SIZE, UPDATE, free_port, send_as_to_sglang, written
from tests.unit.server.trainers import folder as folder
from tests.waiting import PATIENCE_S

pytestmark = pytest.mark.gpu
GPUS = torch.cuda.device_count()


def start(ranks: int, *options: str) -> tuple[str, ...]:
    """Options of a server: in float32, where no two tokens tie."""
    sizes = ("--tensor-model-parallel-size", str(ranks))
    return ("--device", "cuda", "--dtype", "float32", "--weights-interface", "lo", *sizes, *options)


@pytest.fixture(scope="module")
def expected(folder: Path) -> Iterator[str]:
    """What a server writes that is started with the changed weights."""
    with started(*start(1, "--load", str(folder))) as tool:
        yield written(tool)


@pytest.mark.parametrize(("backend", "ranks", "gpus"), [("gloo", 1, 1), ("nccl", 1, 2), ("nccl", 2, 3)])
def test_a_trainer_of_sglangs_kind_sends_a_model(
    folder: Path, expected: str, backend: str, ranks: int, gpus: int
) -> None:
    """CUDA graphs, which were captured before, read the new weights."""
    if gpus > GPUS:
        pytest.skip(f"needs {gpus} GPUs")
    with started(*start(ranks)) as tool:
        before = written(tool)
        send_as_to_sglang(tool, ranks, folder, backend)
        assert written(tool) == expected != before


def join(tool: Tool, pool: ThreadPoolExecutor) -> OutsideGroup:
    """A trainer over NCCL in this process, on the second GPU."""
    port = free_port()
    place = {"master_address": "127.0.0.1", "master_port": port, "rank_offset": 1, "world_size": 2}
    joining = pool.submit(tool.post, "/init_weights_update_group", place | {"backend": "nccl"})
    device = torch.device("cuda", 1)
    group = OutsideGroup("127.0.0.1", port, rank=0, size=2, backend="nccl", seconds=PATIENCE_S, device=device)
    assert joining.result(PATIENCE_S).status_code == 200
    return group


@pytest.mark.skipif(GPUS < 2, reason="needs two GPUs")
@pytest.mark.parametrize("sent_before", [False, True])
def test_a_trainer_that_sends_nothing_over_nccl_costs_time_alone(
    folder: Path, expected: str, sent_before: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the first tensor, when NCCL has not connected the two, and afterwards, when a kernel waits. The engine
    goes on with the weights that it had, and takes those of a group that is made anew."""
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "lo")
    weights = {name: tensor.cuda(1) for name, tensor in load_file(folder / "model.safetensors").items()}
    norm = {"names": [NORM], "dtypes": [str(weights[NORM].dtype)], "shapes": [[SIZE]]}
    dtypes, shapes = [str(t.dtype) for t in weights.values()], [list(t.shape) for t in weights.values()]
    whole = {"names": list(weights), "dtypes": dtypes, "shapes": shapes}
    with ThreadPoolExecutor() as pool, started(*start(1, "--limits.weights-timeout", "20")) as tool:
        group = join(tool, pool)
        if sent_before:
            receiving = pool.submit(tool.post, UPDATE, norm)
            group.broadcast(weights[NORM], PATIENCE_S)
            assert receiving.result(PATIENCE_S).status_code == 200
        before = written(tool)
        refused = tool.post(UPDATE, norm)
        assert refused.status_code == 400 and "did not arrive" in refused.json()["message"], refused.text
        assert written(tool) == before
        group.close()
        group = join(tool, pool)
        receiving = pool.submit(tool.post, UPDATE, whole)
        for tensor in weights.values():
            group.broadcast(tensor.contiguous(), PATIENCE_S)
        assert receiving.result(PATIENCE_S).status_code == 200
        assert written(tool) == expected
        group.close()
