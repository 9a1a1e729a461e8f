"""TransformerEngine's FusedAdam in place of torch's fused AdamW: the same updates, skipped ones, resume, and bf16 runs
whose float32 weights megatron-core keeps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from megatron_multiverse.config import OptimConfig
from megatron_multiverse.training.optim import build_optimizer
from megatron_multiverse.training.sharded_state import adamw_steps, set_adamw_steps
from megatron_multiverse.training.trainer import train

from .test_training_gpu import Loader, config

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]
pytest.importorskip("transformer_engine", reason="TransformerEngine is not installed")

TE: Literal["transformer_engine"] = "transformer_engine"


def updated(implementation: Literal["torch", "transformer_engine"], steps: int) -> tuple[Any, list[torch.Tensor]]:
    """The optimizer and all it has changed, after so many updates and one that is skipped."""
    torch.manual_seed(0)
    model = torch.nn.Linear(300, 500, device="cuda")
    optimizer: Any = build_optimizer(model, OptimConfig(lr=1e-2, weight_decay=0.1, implementation=implementation))
    for step in range(steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 / (1 + step)
        model(torch.randn(40, 300, device="cuda")).square().mean().backward()
        optimizer.grad_scale, optimizer.found_inf = None, torch.full((), float(step == steps), device="cuda")
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    moments = [optimizer.state[p][key] for p in model.parameters() for key in ("exp_avg", "exp_avg_sq")]
    return optimizer, [*(p.detach() for p in model.parameters()), *moments]


def test_updates_are_those_of_torch_and_a_skipped_one_changes_nothing() -> None:
    for a, b in zip(updated("torch", 5)[1], updated(TE, 5)[1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_the_number_of_updates_is_read_and_put_back() -> None:
    optimizer, _ = updated(TE, 3)
    assert adamw_steps(optimizer) == 4  # the skipped one counts until the run is stopped for it
    set_adamw_steps(optimizer, 7)
    assert adamw_steps(optimizer) == 7


def losses(folder: Path) -> list[float]:
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [row["loss"] for row in rows if row["kind"] == "train"]


@pytest.mark.parametrize(
    ("engine", "dtype"), [("one_process", "float32"), ("megatron", "float32"), ("megatron", "bf16")]
)
def test_a_run_is_that_of_torch_and_goes_on_bit_for_bit(tmp_path: Path, engine: str, dtype: str) -> None:
    def run(name: str, implementation: str, steps: int) -> None:
        values = {"engine": engine, "dtype": dtype, "deterministic": True, "log": {"log_interval": 1}}
        values["optim"] = {"lr": 1e-3, "lr_decay_iters": 6, "implementation": implementation}
        train(config(tmp_path / name, **values, train_iters=steps), Loader())

    run("torch", "torch", 6)
    run("straight", TE, 6)
    run("cut", TE, 3)
    run("cut", TE, 6)
    run("changed", "torch", 3)
    run("changed", TE, 6)
    assert losses(tmp_path / "cut") == losses(tmp_path / "straight")
    tolerance = 1e-5 if dtype == "float32" else 1e-2
    for name in ("straight", "changed"):
        assert losses(tmp_path / name) == pytest.approx(losses(tmp_path / "torch"), rel=tolerance)
