"""AdamW of other packages: the same numbers as torch's, and clear words where a package is missing or another one.

The packages need a GPU, so a stand-in takes their place: the class that both have, as far as it is used, written from
its interface. tests/gpu runs TransformerEngine's own.
"""

from __future__ import annotations

import importlib
import math
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.optimizer import distrib_optimizer

from megatron_multiverse.config import OptimConfig
from megatron_multiverse.errors import ConfigError, TrainingError
from megatron_multiverse.training import fused_adamw, trainer
from megatron_multiverse.training.fused_adamw import apex_problem, check_optimizer
from megatron_multiverse.training.optim import build_optimizer
from megatron_multiverse.training.trainer import train

from .synthetic import SyntheticLoader, config
from .test_trainer import records


class FusedAdam(torch.optim.Optimizer):
    """Capturable: learning rate and step count are tensors, and an update is skipped where the scaler has found inf."""

    def __init__(self, params, lr, betas, eps, weight_decay, *, adam_w_mode, capturable):
        assert adam_w_mode and capturable
        super().__init__(params, {"lr": torch.tensor(lr), "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.skipped = torch.zeros(1, dtype=torch.int32)

    def zero_grad(self):
        raise AssertionError("apex's takes no argument")

    @torch.no_grad()
    def step(self, closure=None, grad_scaler=None):
        for group in self.param_groups:
            device, (beta1, beta2) = group["params"][0].device, group["betas"]
            assert isinstance(group["lr"], torch.Tensor) and group["lr"].dtype == torch.float32
            if "step" in group:
                group["step"] += (self.skipped != 1).to(torch.int32)
            else:
                group["step"] = torch.tensor([1], dtype=torch.int32)
            self.skipped.copy_(grad_scaler._check_inf_per_device(self)[device])
            if self.skipped:
                continue
            for p in group["params"]:
                state = self.state[p]
                if len(state) == 0:
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
                grad = p.grad / grad_scaler._get_scale_async()
                state["exp_avg"].lerp_(grad, 1 - beta1)
                state["exp_avg_sq"].mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
                first, second = (1 - beta ** group["step"] for beta in (beta1, beta2))
                update = state["exp_avg"] / first / ((state["exp_avg_sq"] / second).sqrt() + group["eps"])
                p -= group["lr"] * (update + group["weight_decay"] * p)


@pytest.fixture(params=["transformer_engine", "apex"])
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """An implementation whose package is the stand-in."""
    module = types.ModuleType("stand_in")
    module.FusedAdam = FusedAdam  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "stand_in", module)
    monkeypatch.setitem(fused_adamw.MODULES, request.param, "stand_in")
    monkeypatch.setattr(trainer, "check_optimizer", lambda config, device: None)
    monkeypatch.setattr(distrib_optimizer, "Adam", FusedAdam)  # which megatron-core takes from the package
    return str(request.param)


def test_updates_are_those_of_torch(implementation: str) -> None:
    """A group without parameters, a learning rate that changes, and a step that is skipped."""
    made = []
    for name in ("torch", implementation):
        torch.manual_seed(0)
        model = torch.nn.Linear(5, 3)
        optimizer: Any = build_optimizer(model, OptimConfig(lr=1e-2, weight_decay=0.1, implementation=name))
        optimizer.add_param_group({"params": []})
        for step in range(6):
            for group in optimizer.param_groups:
                group["lr"] = 1e-2 / (1 + step)
            (model(torch.randn(4, 5)).square().sum() * 3).backward()
            optimizer.grad_scale, optimizer.found_inf = None, torch.tensor(float(step == 5))
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            assert [group["lr"] for group in optimizer.param_groups] == [1e-2 / (1 + step)] * 3
        moments = [optimizer.state[p][key] for p in model.parameters() for key in ("exp_avg", "exp_avg_sq")]
        made.append([*model.parameters(), *moments])
    for a, b in zip(*made, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("engine", ["one_process", "megatron"])
def test_a_run_is_that_of_torch_and_goes_on_bit_for_bit(tmp_path: Path, implementation: str, engine: str) -> None:
    settings = {"engine": engine, "optim.lr_decay_iters": 6}
    fused = settings | {"optim.implementation": implementation}
    train(config(tmp_path / "torch", **settings), SyntheticLoader())
    train(config(tmp_path / "straight", **fused), SyntheticLoader())
    for steps in (3, 6):
        train(config(tmp_path / "cut", **fused, train_iters=steps), SyntheticLoader())
    plain, straight, cut = (
        [row["loss"] for row in records(tmp_path / name, "train")] for name in ("torch", "straight", "cut")
    )
    assert straight == cut and straight == pytest.approx(plain, rel=1e-5)


def test_a_run_goes_on_with_another_implementation_and_says_so(
    tmp_path: Path, implementation: str, caplog: pytest.LogCaptureFixture
) -> None:
    settings = {"optim.lr_decay_iters": 6}
    train(config(tmp_path / "torch", **settings), SyntheticLoader())
    train(config(tmp_path / "changed", **settings, train_iters=3), SyntheticLoader())
    train(config(tmp_path / "changed", **settings, **{"optim.implementation": implementation}), SyntheticLoader())
    losses = [[row["loss"] for row in records(tmp_path / name, "train")] for name in ("torch", "changed")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert f"ran with optim.implementation torch, this run goes on with {implementation}" in caplog.text


def test_a_number_that_is_not_finite_changes_no_weight(
    tmp_path: Path, implementation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron_multiverse.training import one_process

    engines, clip = [], one_process.clip_gradients

    class Engine(one_process.OneProcessEngine):
        def step(self, microbatches: Any) -> Any:
            engines.append((self, [p.detach().clone() for p in self.model.parameters()]))
            return super().step(microbatches)

    def broken(parameters: Any, limit: float) -> torch.Tensor:
        kept = list(parameters)
        if len(engines) >= 3:
            kept[0].grad.fill_(math.nan)
        return clip(kept, limit)

    monkeypatch.setattr(trainer, "OneProcessEngine", Engine)
    monkeypatch.setattr(one_process, "clip_gradients", broken)
    run = config(
        tmp_path, **{"optim.implementation": implementation, "log.log_interval": 5, "checkpoint.save_interval": 0}
    )
    with pytest.raises(TrainingError, match="not finite at step 3"):
        train(run, SyntheticLoader())
    engine, before = engines[2]
    assert all(torch.equal(a, b) for a, b in zip(before, engine.model.parameters(), strict=True))


def package(folder: Path, name: str, text: str, *modules: str) -> None:
    (folder / name).mkdir(parents=True)
    (folder / name / "__init__.py").write_text(text)
    for module in modules:
        (folder / name / f"{module}.py").write_text("")


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of packages that can be imported."""
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for name in ("apex", "apex.optimizers", "amp_C"):
        sys.modules.pop(name, None)


def found_problem() -> str | None:
    importlib.invalidate_caches()
    return apex_problem()


def test_the_apex_of_the_package_index_is_recognised(installed: Path) -> None:
    assert "is not installed" in str(found_problem()) and "unrelated package" in str(found_problem())
    package(installed, "apex", "")
    record = installed / "apex-0.9.10.dist-info"
    record.mkdir()
    (record / "METADATA").write_text("Metadata-Version: 2.1\nName: apex\nVersion: 0.9.10.dev0\n")
    assert "package apex 0.9.10.dev0 is not NVIDIA's" in str(found_problem())
    assert "pip uninstall apex" in str(found_problem())


def test_an_apex_that_cannot_be_imported_is_not_nvidias(installed: Path) -> None:
    package(installed, "apex", "import a_package_that_is_not_there")
    assert "is not NVIDIA's" in str(found_problem())


def test_nvidias_apex_is_taken_with_its_extensions_alone(installed: Path) -> None:
    package(installed, "apex", "", "optimizers")
    assert "without its CUDA extensions" in str(found_problem())
    (installed / "amp_C.py").write_text("")
    assert found_problem() is None


@pytest.mark.parametrize("name", ["transformer_engine", "apex"])
def test_what_cannot_run_is_refused_before_anything_is_built(tmp_path: Path, name: str) -> None:
    loader = SyntheticLoader()
    with pytest.raises(
        ConfigError, match=f"optim.implementation '{name}' cannot run here: .*CUDA device, got cpu.*torch"
    ):
        train(config(tmp_path, **{"optim.implementation": name}), loader)
    assert not loader.seen and not (tmp_path / "metrics.jsonl").exists()


def test_apex_beside_transformer_engine_is_refused_for_the_distributed_optimizer(
    tmp_path: Path, installed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package(installed, "apex", "", "optimizers")
    (installed / "amp_C.py").write_text("")
    importlib.invalidate_caches()
    monkeypatch.setattr(distrib_optimizer, "USING_TE_OPTIMIZER", True)
    run = config(tmp_path, **{"optim.implementation": "apex", "engine": "megatron"})
    with pytest.raises(ConfigError, match="takes no other fused Adam than TransformerEngine's"):
        check_optimizer(run, torch.device("cuda"))
    check_optimizer(config(tmp_path, **{"optim.implementation": "apex"}), torch.device("cuda"))


def test_deepspeed_takes_torchs_alone(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"optim.implementation 'apex' does not go with engine deepspeed"):
        config(
            tmp_path,
            **{"engine": "deepspeed", "optim.implementation": "apex", "layers.loss_chunk_tokens": None},
        )
