"""The seam of the trainer: an engine that shares nothing with ours but the protocol goes through the same loop."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from torch import Tensor
from torch.nn import functional

from megatron_multiverse.config import LayerConfig, ModelConfig, TrainConfig
from megatron_multiverse.errors import TrainingError
from megatron_multiverse.model.mcore import ensure_parallel_state
from megatron_multiverse.training.engine import StepResult, TrainEngine
from megatron_multiverse.training.host_memory import HostMemory
from megatron_multiverse.training.metrics import MetricsWriter
from megatron_multiverse.training.microbatches import Loader, Microbatch
from megatron_multiverse.training.phases import PhaseClock
from megatron_multiverse.training.trainer import train
from megatron_multiverse.training.validation import Validation

from .synthetic import SyntheticLoader, config


class BigramEngine:
    """A table of logits of the next token, one row per token, trained by SGD with momentum."""

    layers = LayerConfig(attention_backend="dense", transformer_impl="local")
    device = torch.device("cpu")
    peak_tflops = None
    learning_rate = 10.0
    clock = PhaseClock(device)

    def __init__(self, run: TrainConfig, model: ModelConfig, loader: Loader, valid_loader: Loader | None) -> None:
        ensure_parallel_state()
        self.model = torch.nn.Linear(model.vocab_size, model.vocab_size, bias=False)
        self.table = self.model.weight
        torch.nn.init.zeros_(self.table)
        self.momentum = torch.zeros_like(self.table)
        self.steps, self.is_inside = 0, False

    @contextlib.contextmanager
    def running(self):
        self.is_inside = True
        yield
        self.is_inside = False

    def loss_sum(self, batch: Microbatch) -> Tensor:
        losses = functional.cross_entropy(self.table[batch["input_ids"]].mT, batch["labels"], reduction="none")
        return (losses * batch["loss_mask"]).sum()

    def step(self, microbatches: Sequence[Microbatch]) -> StepResult:
        assert self.is_inside
        count = sum(int(batch["loss_mask"].sum()) for batch in microbatches)
        total = torch.stack([self.loss_sum(batch) for batch in microbatches]).sum()
        (gradient,) = torch.autograd.grad(total / count, self.table)
        self.momentum.mul_(0.5).add_(gradient)
        self.table.data.sub_(self.learning_rate * self.momentum)
        self.steps += 1
        tokens = sum(batch["input_ids"].numel() for batch in microbatches)
        return StepResult(total.detach(), count, tokens, torch.zeros((), dtype=torch.int64), gradient.norm())

    @torch.no_grad()
    def validate(self, microbatches: Iterable[Microbatch]) -> Validation:
        batches = list(microbatches)
        count = sum(int(batch["loss_mask"].sum()) for batch in batches)
        return Validation(sum(float(self.loss_sum(batch)) for batch in batches) / count, count)

    def check(self, metrics: MetricsWriter) -> None:
        if not self.table.isfinite().all():
            raise TrainingError("the table is not finite")

    def state(self, *, is_loading: bool = False, host: HostMemory | None = None) -> dict[str, Any]:
        tensors = {"table": self.table.detach(), "momentum": self.momentum}
        sharded = {name: ShardedTensor.from_rank_offsets(name, tensor) for name, tensor in tensors.items()}
        return sharded if is_loading else {**sharded, "steps": self.steps}

    def load(self, state: dict[str, Any], folder: Path) -> None:
        self.table.data.copy_(state["table"])
        self.momentum.copy_(state["momentum"])
        self.steps = state["steps"]

    def save_model(self, folder: Path) -> None:
        assert self.is_inside
        folder.mkdir(exist_ok=True)
        torch.save(self.table.detach(), folder / "table.pt")


def build(run: TrainConfig, model: ModelConfig, loader: Loader, valid_loader: Loader | None) -> TrainEngine:
    return BigramEngine(run, model, loader, valid_loader)


def numbers(folder: Path, kind: str) -> list[tuple[float, ...]]:
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [(row["step"], row["loss"], row["loss_tokens"]) for row in rows if row["kind"] == kind]


class OneBatch(SyntheticLoader):
    """The same microbatch again and again."""

    def batch(self, number: int) -> dict[str, Tensor]:
        return super().batch(1)


def test_another_engine_trains_validates_saves_and_resumes(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"optim.lr_warmup_iters": 0, "eval_interval": 3, "eval_iters": 2}
    straight = train(config(tmp_path / "a", **settings), OneBatch(), OneBatch(), build)
    train(config(tmp_path / "b", train_iters=3, **settings), OneBatch(), OneBatch(), build)
    loader = OneBatch()
    resumed = train(config(tmp_path / "b", **settings), loader, OneBatch(), build)
    assert straight.step == resumed.step == 6 and loader.seen == list(range(6, 12))
    tables = [torch.load(result.model_folder / "table.pt") for result in (straight, resumed)]
    assert torch.equal(*tables)
    for kind, count in (("train", 6), ("valid", 2)):
        rows = numbers(tmp_path / "a", kind)
        assert numbers(tmp_path / "b", kind) == rows and len(rows) == count
        assert rows[-1][1] < rows[0][1] <= math.log(32) + 1e-4
    assert sorted(folder.name for folder in (tmp_path / "b").glob("iter_*")) == ["iter_0000003", "iter_0000006"]


def test_nothing_is_saved_before_the_engine_was_asked(tmp_path: Path) -> None:
    class Broken(BigramEngine):
        def step(self, microbatches: Sequence[Microbatch]) -> StepResult:
            result = super().step(microbatches)
            if self.steps == 5:
                self.table.data.fill_(math.nan)
            return result

    settings = {"log.log_interval": 10, "checkpoint.save_interval": 2}
    with pytest.raises(TrainingError, match="table is not finite"):
        train(config(tmp_path, **settings), SyntheticLoader(), None, Broken)
    assert (tmp_path / "latest_checkpointed_iteration.txt").read_text() == "4\n"
