"""DeepSpeed's ZeRO trains as one process does, goes on from any checkpoint bit for bit, and stops where it must."""

from __future__ import annotations

import json
import math
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import distributed

from megatron_multiverse.checkpoints.load import load_checkpoint
from megatron_multiverse.errors import RankError, TrainingError
from megatron_multiverse.parallel.local_ranks import run_ranks
from megatron_multiverse.training.engine import TrainEngine
from megatron_multiverse.training.trainer import build_engine, train

from .runs import LIMIT_S, MODEL, STEPS, config, numbers, train_on, train_rank
from .test_layouts import TOLERANCE
from .test_resume import train_until_killed

pytest.importorskip("deepspeed", reason="the extra deepspeed is not installed")

ZERO: dict[str, Any] = {"engine": "deepspeed", "layers.loss_chunk_tokens": None, "eval_iters": 1}
LAYOUTS: dict[str, tuple[str, dict[str, Any]]] = {
    "1": ("3", {"deepspeed.zero_stage": 1}),
    "2": ("1", {"deepspeed.zero_stage": 2}),
    "3": ("2", {}),
    "2, offloaded": ("3", {"deepspeed.zero_stage": 2, "deepspeed.offload_optimizer": "cpu"}),
    "3, offloaded": ("2", {"deepspeed.offload_optimizer": "cpu", "deepspeed.offload_param": "cpu"}),
    "3, context": ("2", {"parallel.context_parallel_size": 2, "eval_iters": 2}),
}
"""Name -> the layout whose first half of a run it finishes, and its settings."""
FINISHED = [name for name in LAYOUTS if STEPS > 4 or name not in ("2", "3")]
"""In the short test the offloaded layouts stand for these two."""
FRESH = ("1", "2", "3")
BF16: dict[str, Any] = {**ZERO, "dtype": "bf16", "checkpoint.save_interval": 1}


def play(data: Path, folder: Path) -> list[str]:
    """Everything that two ranks do here, by the same two processes: their start is most of the time."""
    for name in FRESH:
        train_rank(data, folder / name, 2, {**ZERO, **LAYOUTS[name][1], "train_iters": STEPS // 2})
    for name in FINISHED:
        other, layout = LAYOUTS[name]
        if distributed.get_rank() == 0:
            shutil.copytree(folder / other, folder / f"{name}, resumed")
        distributed.barrier()
        train_rank(data, folder / f"{name}, resumed", 2, {**ZERO, **layout})
    for name, steps in (("straight", STEPS), ("cut", STEPS // 2), ("cut", STEPS)):
        settings = {**BF16, "deepspeed.zero_stage": 1, "train_iters": steps, "checkpoint.async_save": name == "cut"}
        train_rank(data, folder / f"{name} 1", 2, settings)
    train_rank(data, folder / "straight 3", 2, BF16)
    return [
        with_a_bad_gradient(data, folder / f"bad {stage}", {**BF16, "deepspeed.zero_stage": stage}) for stage in (1, 3)
    ]


def with_a_bad_gradient(data: Path, save: Path, settings: dict[str, Any]) -> str:
    """What stops a run whose second gradient is not a number on one rank."""

    def make(*args: Any) -> TrainEngine:
        engine: Any = build_engine(*args)
        if distributed.get_rank() == 1:
            weight = next(engine.model.parameters())
            weight.register_hook(lambda grad: grad * (math.nan if engine.scheduler.num_steps == 2 else 1))
        return engine

    try:
        train(config(data, save, **settings), make_engine=make)
    except TrainingError as error:
        return str(error)
    return "nothing"


@pytest.fixture(scope="module")
def played(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("zero")
    (folder / "stopped.json").write_text(json.dumps(run_ranks(play, 2, data, folder, timeout=LIMIT_S)))
    return folder


@pytest.mark.parametrize("name", [*FRESH, *(f"{name}, resumed" for name in FINISHED)])
def test_every_stage_trains_as_one_process_does(name: str, played: Path, reference: dict[str, list[float]]) -> None:
    found, steps = numbers(played / name), STEPS // 2 if name in FRESH else STEPS
    assert found["loss_tokens"] == reference["loss_tokens"][:steps]
    for column in ("loss", "grad_norm"):
        assert found[column] == pytest.approx(reference[column][:steps], rel=TOLERANCE)
    if steps == STEPS:
        assert found["valid"][-1:] == pytest.approx(reference["valid"], rel=TOLERANCE)


def test_a_run_goes_on_bit_for_bit(played: Path) -> None:
    """bf16: the float32 weights that only the optimizer has are what a checkpoint holds."""
    straight = numbers(played / "straight 1")
    assert numbers(played / "cut 1")["loss"] == straight["loss"]
    assert straight["loss"][-1] < straight["loss"][0]
    assert_same_weights(played / "straight 1", played / "cut 1")


def test_a_run_that_is_killed_goes_on_bit_for_bit(played: Path, data: Path, tmp_path: Path) -> None:
    beside = {**BF16, "checkpoint.async_save": True}
    with pytest.raises(RankError):
        run_ranks(train_until_killed, 2, data, tmp_path, beside, random.Random(1).uniform(0, 0.4), timeout=LIMIT_S)
    run_ranks(train_rank, 2, data, tmp_path, 2, beside, timeout=LIMIT_S)
    straight, resumed = numbers(played / "straight 3"), numbers(tmp_path)
    count = len(straight["loss"])
    assert resumed["loss"][-1:] == straight["loss"][-1:] and len(resumed["loss"]) >= count
    assert set(resumed["loss"]) == set(straight["loss"])
    assert_same_weights(played / "straight 3", tmp_path)


def assert_same_weights(one: Path, other: Path) -> None:
    a, b = (load_file(folder / "model/model.safetensors") for folder in (one, other))
    assert a.keys() == b.keys() and all(torch.equal(tensor, b[name]) for name, tensor in a.items())


def test_a_gradient_that_is_not_finite_on_one_rank_stops_all(played: Path) -> None:
    for messages in json.loads((played / "stopped.json").read_text()):
        assert all("not finite at step 2" in message for message in messages)
    assert {(played / f"bad {stage}/latest_checkpointed_iteration.txt").read_text() for stage in (1, 3)} == {"1\n"}


def test_tools_read_what_a_run_leaves(played: Path) -> None:
    """The final weights, and the checkpoint that ZeRO's ranks wrote in turns: the same model."""
    folder = played / "straight 3"
    (model, shape), (other, _) = (load_checkpoint(folder / name) for name in ("model", f"iter_{STEPS:07d}"))
    assert shape.vocab_size == MODEL["vocab_size"]
    for (name, weight), (_, exact) in zip(model.named_parameters(), other.named_parameters(), strict=True):
        assert torch.equal(weight, exact.bfloat16().float()), name


def test_tensor_parallel_ranks_share_by_zero_too(data: Path, reference: dict[str, list[float]], tmp_path: Path) -> None:
    found = train_on(4, data, tmp_path, **ZERO, **{"parallel.tensor_model_parallel_size": 2, "train_iters": 2})
    for column in ("loss", "grad_norm"):
        assert found[column] == pytest.approx(reference[column][:2], rel=TOLERANCE)
