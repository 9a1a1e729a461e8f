"""Training on one GPU: same numbers as on the CPU, bit-exact resume, bf16, and where the time of a step goes."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from megatron_multiverse.checkpoints.load import load_checkpoint
from megatron_multiverse.config import TrainConfig
from megatron_multiverse.kernels.multiverse_attention import BACKENDS, AttentionCase
from megatron_multiverse.model.attention import LayoutParams
from megatron_multiverse.model.families import qwen3
from megatron_multiverse.model.gpt import build_gpt_model
from megatron_multiverse.model.weights import weight_state
from megatron_multiverse.training.forward import LossFunction, masked_loss_sum
from megatron_multiverse.training.one_process import OneProcessEngine
from megatron_multiverse.training.start import create_model
from megatron_multiverse.training.trainer import train

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]

MODEL = qwen3(
    num_layers=2, hidden_size=64, ffn_hidden_size=128, num_attention_heads=4, num_query_groups=2, kv_channels=16,
    vocab_size=64, max_sequence_length=64,
)  # fmt: skip


class Loader:
    """Microbatch number n depends on n alone."""

    tag_ids = None
    position = 0

    def __iter__(self):
        while True:
            g = torch.Generator().manual_seed(self.position)
            self.position += 1
            ids = torch.randint(0, 64, (4, 65), generator=g)
            yield {
                "input_ids": ids[:, :-1],
                "labels": ids[:, 1:],
                "loss_mask": (torch.rand(4, 64, generator=g) < 0.5).float(),
                "position_ids": torch.randint(0, 64, (4, 64), generator=g),
                "r": torch.stack([torch.randperm(64, generator=g) for _ in range(4)]).int(),
            }

    def sample_name(self, sample_id):
        return f"sample {sample_id}"

    def sample_problem(self, sample_id):
        return None

    def state_dict(self):
        return {"position": self.position}

    def load_state_dict(self, state):
        self.position = state["position"]


def config(save: Path, **changes) -> TrainConfig:
    values = {
        "model": MODEL,
        "data": {"data_prefixes": ["-"], "seq_length": 64, "micro_batch_size": 4, "global_batch_size": 8},
        "checkpoint": {"save": str(save), "save_interval": 3},
        "optim": {"lr": 1e-3},
        "train_iters": 6,
        "device": "cuda",
    }
    return TrainConfig.from_dict(values | changes)


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float64, 1e-10), (torch.float32, 1e-4)])
def test_logits_equal_the_cpu(dtype: torch.dtype, atol: float) -> None:
    batch = next(iter(Loader()))
    outputs = []
    for device in ("cpu", "cuda"):
        model = build_gpt_model(MODEL, dtype=dtype, device=device, seed=1)
        ids, positions, r = (batch[name].to(device) for name in ("input_ids", "position_ids", "r"))
        with torch.no_grad():
            outputs.append(model(ids, positions, None, packed_seq_params=LayoutParams.from_labels(r)).cpu())
    torch.testing.assert_close(outputs[1], outputs[0], rtol=0, atol=atol)


@pytest.mark.parametrize(
    ("dtype", "kv_channels", "layers", "backend"),
    [
        ("float32", 16, {}, "dense"),
        ("bf16", 16, {}, "flex"),
        ("bf16", 64, {}, "flash4"),
        ("bf16", 64, {"recompute_granularity": "full"}, "flash4"),
    ],
)
def test_a_resumed_deterministic_run_is_bit_equal(tmp_path: Path, dtype, kv_channels, layers, backend) -> None:
    if backend == "flash4" and (problem := BACKENDS["flash4"].problem(AttentionCase("cuda", torch.bfloat16, 64))):
        pytest.skip(problem)
    model = dataclasses.replace(MODEL, kv_channels=kv_channels)
    settings = {"dtype": dtype, "deterministic": True, "model": model, "layers": layers}
    for run in "abb":
        if (tmp_path / run).exists():
            assert (tmp_path / run / "iter_0000003").is_dir()
            (tmp_path / run / "latest_checkpointed_iteration.txt").write_text("3\n")
        train(config(tmp_path / run, **settings), Loader())
    a, b = (weight_state(load_checkpoint(tmp_path / run / "model")[0]) for run in "ab")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert f'"attention_backend": "{backend}"' in (tmp_path / "a" / "metrics.jsonl").read_text()


class Pause:
    """Keeps the device busy for about 20 ms, and knows how long it was."""

    def __init__(self) -> None:
        self.marks: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def __call__(self) -> None:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        torch.cuda._sleep(30_000_000)
        end.record()
        self.marks.append((start, end))

    def seconds(self) -> float:
        return sum(start.elapsed_time(end) for start, end in self.marks) / 1e3


def engine_of(save: Path, loss: LossFunction = masked_loss_sum, dtype="float32", kv_channels=16) -> OneProcessEngine:
    run = config(save, dtype=dtype, model=dataclasses.replace(MODEL, kv_channels=kv_channels))
    assert run.model is not None
    model, layers = create_model(run, run.model, torch.device("cuda"))
    return OneProcessEngine(run, model, run.model, layers, Loader(), loss=loss)


@pytest.mark.parametrize(("dtype", "kv_channels", "backend"), [("float32", 16, "dense"), ("bf16", 64, "flash4")])
def test_a_step_waits_for_nothing(tmp_path: Path, dtype, kv_channels, backend) -> None:
    if backend == "flash4" and (problem := BACKENDS["flash4"].problem(AttentionCase("cuda", torch.bfloat16, 64))):
        pytest.skip(problem)
    engine, batches = engine_of(tmp_path, dtype=dtype, kv_channels=kv_channels), iter(Loader())
    assert engine.layers.attention_backend == backend
    with engine.running():
        engine.step([next(batches), next(batches)])
        microbatches = [next(batches), next(batches)]
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            engine.step(microbatches)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_phases_are_timed_on_the_device_and_only_reading_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each phase lasts at least as long as the device was kept busy in it, and all of them fit into the steps."""
    in_forward, in_backward, waits = Pause(), Pause(), []

    class Event(torch.cuda.Event):
        def synchronize(self) -> None:
            waits.append(self)
            super().synchronize()

    def slow_loss(model, batch, placer):
        loss_sum, pairs = masked_loss_sum(model, batch, placer)
        in_forward()
        loss_sum.register_hook(lambda gradient: in_backward())
        return loss_sum, pairs

    engine, batches = engine_of(tmp_path, slow_loss), iter(Loader())
    with engine.running():
        engine.step([next(batches), next(batches)])
        engine.clock.read(1)
        in_forward.marks, in_backward.marks = [], []
        monkeypatch.setattr(torch.cuda, "Event", Event)
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began.record()
        for _ in range(2):
            engine.step([next(batches), next(batches)])
        ended.record()
        assert not waits
        phases = engine.clock.read(1)
    ended.synchronize()
    assert len(in_forward.marks) == len(in_backward.marks) == 4
    tolerance = 1e-5  # events count half microseconds
    forward, backward, optimizer = (phases[f"{name}_s"] or 0.0 for name in ("forward", "backward", "optimizer"))
    assert len(phases) == 3 and forward > in_forward.seconds() - tolerance
    assert backward > in_backward.seconds() - tolerance and optimizer > 0
    assert forward + backward + optimizer < began.elapsed_time(ended) / 1e3 + tolerance
