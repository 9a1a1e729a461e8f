"""Curves elsewhere: the numbers of metrics.jsonl, one run however often it is resumed. The packages are stand-ins."""

from __future__ import annotations

import importlib.machinery
import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from megatron_multiverse.errors import ConfigError
from megatron_multiverse.training.trainer import train
from tests.unit.training.synthetic import SyntheticLoader, config


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What the stand-ins of both packages were asked for."""
    made: list[tuple[Any, ...]] = []

    class SummaryWriter:
        def __init__(self, folder: str, purge_step: int) -> None:
            made.append(("tensorboard", folder, purge_step))

        def add_scalar(self, name: str, value: float, step: int) -> None:
            made.append((name, value, step))

        def flush(self) -> None: ...

        def close(self) -> None:
            made.append(("tensorboard closed",))

    class Run:
        def define_metric(self, name: str, step_metric: str) -> None: ...

        def log(self, values: dict[str, float]) -> None:
            made.append(("logged", values))

        def finish(self) -> None:
            made.append(("wandb finished",))

    def init(**options: Any) -> Run:
        made.append(("wandb", options))
        return Run()

    for name, content in (
        ("tensorboard", {}),
        ("torch.utils.tensorboard", {"SummaryWriter": SummaryWriter}),
        ("wandb", {"init": init}),
    ):
        module = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    return made


def test_both_get_the_numbers_of_every_log_line_and_go_on_as_one_run(calls: list[Any], tmp_path: Path) -> None:
    run = tmp_path / "run"
    asked = {"log.tensorboard": True, "log.wandb_project": "tests"}
    train(config(run, train_iters=3, **asked), SyntheticLoader())
    train(config(run, **asked), SyntheticLoader())
    assert [call for call in calls if call[0] == "tensorboard"] == [
        ("tensorboard", str(run / "tensorboard"), first) for first in (1, 4)
    ]
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [(record["loss"], record["step"]) for record in records if record["kind"] == "train"]
    assert len(losses) == 6 and [call[1:] for call in calls if call[0] == "train/loss"] == losses
    started = [call[1] for call in calls if call[0] == "wandb"]
    assert len(started) == 2 and len({options["id"] for options in started}) == 1  # one run there
    assert started[1]["project"] == "tests" and started[1]["resume"] == "allow" and started[1]["name"] == "run"
    assert started[0]["config"]["optim"]["lr"] == 1e-2
    logged = [call[1] for call in calls if call[0] == "logged"]
    assert [(values["train/loss"], values["step"]) for values in logged] == losses
    assert calls.count(("wandb finished",)) == calls.count(("tensorboard closed",)) == 2


def test_without_being_asked_for_neither_is_touched(calls: list[Any], tmp_path: Path) -> None:
    train(config(tmp_path / "run", train_iters=3), SyntheticLoader())
    assert calls == []


@pytest.mark.parametrize(("package", "asked"), [("tensorboard", True), ("wandb", "tests")])
def test_a_missing_package_is_named_before_anything_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str, asked: Any
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    setting = "log.tensorboard" if package == "tensorboard" else "log.wandb_project"
    with pytest.raises(ConfigError, match=rf"{setting} .* needs the package {package}, which is not installed"):
        train(config(tmp_path / "run", **{setting: asked}), SyntheticLoader())
    assert not (tmp_path / "run").exists()
