from __future__ import annotations

import json
import logging
import os
import signal
from pathlib import Path

import pytest
import torch

from megatron_multiverse.checkpoints.convert import convert_checkpoint
from megatron_multiverse.checkpoints.convert_config import ConvertConfig
from megatron_multiverse.checkpoints.load import load_checkpoint
from megatron_multiverse.checkpoints.sources import open_checkpoint
from megatron_multiverse.config import ModelConfig, TrainConfig
from megatron_multiverse.errors import ConfigError, TrainingError
from megatron_multiverse.kernels.multiverse_attention import AttentionCase, backends
from megatron_multiverse.model.attention import LayoutParams
from megatron_multiverse.model.families import preset
from megatron_multiverse.model.gpt import build_gpt_model
from megatron_multiverse.model.weights import save_model, weight_state
from megatron_multiverse.training import one_process, start
from megatron_multiverse.training.engine import TrainEngine
from megatron_multiverse.training.forward import forward_backward, masked_loss_sum
from megatron_multiverse.training.metrics import MetricsWriter
from megatron_multiverse.training.placement import TokenPlacer
from megatron_multiverse.training.saver import Saver
from megatron_multiverse.training.trainer import train

from .synthetic import SyntheticLoader, config


def records(folder: Path, kind: str) -> list[dict]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [r for r in map(json.loads, lines) if r["kind"] == kind]


@pytest.mark.parametrize(
    ("style", "decay_iters"), [("constant", 0), ("wsd", 6), ("cosine", 6), ("cosine", 9), ("cosine", 4), ("cosine", 0)]
)
def test_a_run_made_longer_is_bit_equal_to_one_planned_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, style: str, decay_iters: int
) -> None:
    """With a fixed end of the decay; a decay that ends with the run has another slope, which is told."""
    schedule = {"optim.lr_decay_style": style, "optim.lr_decay_iters": decay_iters, "optim.min_lr": 1e-4}
    schedule["optim.lr_wsd_decay_iters"] = 3
    train(config(tmp_path / "a", **schedule), SyntheticLoader())
    train(config(tmp_path / "b", train_iters=3, **schedule), SyntheticLoader())
    assert "learning rate schedule differs" not in caplog.text
    train(config(tmp_path / "b", **schedule), SyntheticLoader())
    is_equal = (style, decay_iters) != ("cosine", 0)
    assert ("learning rate schedule differs" in caplog.text) is not is_equal
    rows = [[(r["lr"], r["loss"]) for r in records(tmp_path / run, "train")] for run in "ab"]
    files = [(tmp_path / run / "model" / "model.safetensors").read_bytes() for run in "ab"]
    assert (rows[0] == rows[1]) is (files[0] == files[1]) is is_equal
    if decay_iters == 4:
        assert [lr for lr, _ in rows[0][4:]] == [1e-4, 1e-4]


class SignallingLoader(SyntheticLoader):
    """Sends this process a signal when a microbatch is asked for."""

    def __init__(self, at: int, number: signal.Signals) -> None:
        super().__init__()
        self.at, self.number = at, number

    def batch(self, number: int) -> dict[str, torch.Tensor]:
        if number == self.at:
            os.kill(os.getpid(), self.number)
        return super().batch(number)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_stopped_and_resumed_run_is_bit_equal_to_an_uninterrupted_one(tmp_path: Path, number) -> None:
    straight = SyntheticLoader()
    train(config(tmp_path / "a", **{"checkpoint.save_interval": 0}), straight)

    first = SignallingLoader(at=5, number=number)  # during the third step
    stopped = train(config(tmp_path / "b", **{"checkpoint.save_interval": 0}), first)
    assert (stopped.step, stopped.stopped_by, stopped.model_folder) == (3, number.name, None)
    second = SyntheticLoader()
    finished = train(config(tmp_path / "b", **{"checkpoint.save_interval": 0}), second)

    assert finished.step == 6 and finished.stopped_by is None
    assert first.seen + second.seen == straight.seen == list(range(12))
    models = [load_checkpoint(tmp_path / run / "model")[0] for run in "ab"]
    for name, tensor in weight_state(models[0]).items():
        assert torch.equal(tensor, weight_state(models[1])[name]), name
    for key in ("loss", "lr", "grad_norm", "consumed_samples"):
        a, b = ([r[key] for r in records(tmp_path / run, "train")] for run in "ab")
        assert a == b, key
    assert [(r["step"], r["resumed"]) for r in records(tmp_path / "b", "start")] == [(0, False), (3, True)]


def test_weights_of_an_earlier_end_are_told_from_those_of_now(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A run that goes on leaves RUN/model as it was until its next end; who loads that hears so."""
    run = tmp_path / "run"
    train(config(run, train_iters=3), SyntheticLoader())
    open_checkpoint(run / "model")
    assert "before" not in caplog.text
    assert train(config(run), SignallingLoader(at=7, number=signal.SIGTERM)).step == 4
    told = f"{run / 'model'} holds the weights of step 3, where this run had ended before; the run stands at step 4"
    assert caplog.text.count(told) == 1
    for source, step in ((run / "model", 3), (run, 4), (run / "iter_0000003", 3)):
        caplog.clear()
        export = tmp_path / f"hf_{source.name}"
        convert_checkpoint(ConvertConfig(from_="mcore", to="hf", load=str(source), save=str(export)))
        assert (told in caplog.text) is (source == run / "model")
        assert f"| training_step | {step} |" in (export / "README.md").read_text()
    caplog.clear()
    assert train(config(run), SyntheticLoader()).step == 6
    assert (run / "model" / "training_step.txt").read_text() == "6\n"
    assert "before" not in caplog.text


@pytest.mark.parametrize("during", ["validation", "free answers", "save"])
@pytest.mark.parametrize("beside", [False, True], ids=["waiting", "beside the training"])
def test_a_signal_while_no_step_runs_waits_for_no_further_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, during: str, beside: bool
) -> None:
    """What is saved is the step before, and not twice."""
    observed: list[int] = []

    def signalled() -> None:
        os.kill(os.getpid(), signal.SIGUSR1)

    def observe(engine: TrainEngine, step: int, metrics: MetricsWriter) -> None:
        observed.append(step)
        if during == "free answers":
            signalled()

    def save(saver: Saver) -> None:
        signalled()
        before(saver)

    before = Saver.save
    if during == "save":
        monkeypatch.setattr(Saver, "save", save)
    valid = SignallingLoader(0 if during == "validation" else -1, signal.SIGUSR1)
    settings = {"checkpoint.save_interval": 2 if during == "save" else 0, "checkpoint.async_save": beside}
    result = train(
        config(tmp_path, **settings, eval_interval=2, eval_iters=1), SyntheticLoader(), valid, observe=observe
    )
    assert (result.step, result.stopped_by) == (2, "SIGUSR1")
    assert observed == ([] if during == "validation" else [2])
    assert [record["step"] for record in records(tmp_path, "checkpoint")] == [2]
    assert (tmp_path / "latest_checkpointed_iteration.txt").read_text() == "2\n"


def test_a_run_says_which_layers_ran_and_warns_when_they_change(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train(config(tmp_path, train_iters=3), SyntheticLoader())
    (start,) = records(tmp_path, "start")
    shown = [start[key] for key in ("transformer_impl", "fp8", "fp8_recipe", "attention_backend")]
    assert shown == ["local", None, None, "dense"]
    assert json.loads((tmp_path / "config.json").read_text())["layers"]["transformer_impl"] == "local"  # not "auto"
    train(config(tmp_path, train_iters=4), SyntheticLoader())
    assert "transformer_impl" not in caplog.text and "Overwriting" not in caplog.text
    file = tmp_path / "iter_0000004" / "train_config.json"
    file.write_text(file.read_text().replace('"local"', '"transformer_engine"').replace('"dense"', '"flex"'))
    train(config(tmp_path, train_iters=5), SyntheticLoader())
    assert "ran with layers.transformer_impl transformer_engine, this run goes on with local" in caplog.text
    assert "ran with layers.attention_backend flex, this run goes on with dense" in caplog.text


@pytest.mark.parametrize("deterministic", [False, True])
def test_the_attention_backend_that_runs_is_the_one_chosen_and_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, deterministic: bool
) -> None:
    """Chosen once, knowing whether the run is deterministic; no layer chooses again."""
    cases, ran, attend = [], [], LayoutParams.attend

    def choose(name: str, case: AttentionCase) -> str:
        cases.append(case)
        return backends.choose_backend(name, case)

    def noted(params: LayoutParams, *args: torch.Tensor, **settings: float) -> torch.Tensor:
        ran.append(params.backend)
        return attend(params, *args, **settings)

    monkeypatch.setattr(start, "choose_backend", choose)
    monkeypatch.setattr(LayoutParams, "attend", noted)
    train(config(tmp_path, train_iters=3, deterministic=deterministic), SyntheticLoader())
    assert cases == [AttentionCase("cpu", torch.float32, 8, deterministic=deterministic)]
    assert len(ran) == 6 and {*ran, records(tmp_path, "start")[0]["attention_backend"]} == {"dense"}


def test_the_attention_backend_is_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    backends.choose_backend.cache_clear()
    backends.check_backend.cache_clear()
    backends._log_once.cache_clear()
    with caplog.at_level(logging.INFO):
        train(config(tmp_path, train_iters=3), SyntheticLoader())
    told = [message for message in caplog.messages if message.startswith("attention backend")]
    assert told == ["attention backend: dense (on the CPU)"]


def test_an_attention_backend_that_cannot_run_stops_the_run_before_its_first_step(tmp_path: Path) -> None:
    loader = SyntheticLoader()
    with pytest.raises(ConfigError, match="attention_backend 'flash4' cannot run here"):
        train(config(tmp_path, **{"layers.attention_backend": "flash4"}), loader)
    assert not loader.seen and not (tmp_path / "metrics.jsonl").exists()


def test_a_deterministic_run_asks_for_it_and_puts_it_back(tmp_path: Path) -> None:
    seen = []

    class Loader(SyntheticLoader):
        def batch(self, number: int) -> dict[str, torch.Tensor]:
            seen.append(torch.are_deterministic_algorithms_enabled())
            return super().batch(number)

    for wanted in (True, False):
        train(config(tmp_path / str(wanted), train_iters=3, deterministic=wanted), Loader())
        assert seen and set(seen) == {wanted} and not torch.are_deterministic_algorithms_enabled()
        seen.clear()


def test_loss_is_a_mean_over_the_tokens_of_the_whole_step() -> None:
    loader = SyntheticLoader()
    model = build_gpt_model(config(Path("unused")).model, dtype=torch.float64)
    batches = [loader.batch(0), loader.batch(1)]  # few and many trained tokens
    counts = [b["loss_mask"].sum().item() for b in batches]
    assert counts[1] > 1.5 * counts[0]
    placer = TokenPlacer(loader, torch.device("cpu"), "dense")
    result = forward_backward(model, batches, placer, "float64")
    got = [p.grad.clone() for p in model.parameters()]
    # torch pairs them by their places in memory on a CPU: findings/torch_cpu_fused_adamw_ignores_strides.sh
    assert all(p.grad.stride() == p.stride() for p in model.parameters())

    model.zero_grad()
    sums = [masked_loss_sum(model, b, placer)[0] for b in batches]
    (sum(sums) / sum(counts)).backward()
    torch.testing.assert_close(result.loss, (sum(sums) / sum(counts)).float())
    assert result.loss_tokens == sum(counts)
    for mine, parameter in zip(got, model.parameters(), strict=True):
        torch.testing.assert_close(mine, parameter.grad, rtol=1e-6, atol=1e-9)
    mean_of_means = sum(s / c for s, c in zip(sums, counts, strict=True)) / 2
    assert abs(mean_of_means - result.loss) > 1e-3


def test_gradient_accumulation_equals_one_large_microbatch(tmp_path: Path) -> None:
    train(config(tmp_path / "two", train_iters=3), SyntheticLoader())

    class Joined(SyntheticLoader):
        def batch(self, number: int) -> dict[str, torch.Tensor]:
            halves = [super(Joined, self).batch(2 * number + k) for k in (0, 1)]
            return {name: torch.cat([h[name] for h in halves]) for name in halves[0]}

    train(config(tmp_path / "one", train_iters=3, **{"data.micro_batch_size": 4}), Joined())
    models = [load_checkpoint(tmp_path / run / "model")[0] for run in ("one", "two")]
    for name, tensor in weight_state(models[0]).items():
        torch.testing.assert_close(tensor, weight_state(models[1])[name], rtol=1e-4, atol=1e-5)


def test_non_finite_loss_stops_before_the_update(tmp_path: Path, monkeypatch) -> None:
    calls = []

    def poisoned(*args):
        loss, pairs = masked_loss_sum(*args)
        calls.append(loss)
        return loss * (float("nan") if len(calls) == 9 else 1.0), pairs

    def step(model, microbatches, placer, dtype, loss):
        assert loss.__wrapped__ is masked_loss_sum
        return forward_backward(model, microbatches, placer, dtype, poisoned)

    monkeypatch.setattr(one_process, "forward_backward", step)
    quiet = {"checkpoint.save_interval": 2, "log.log_interval": 10}  # nobody looks at the loss of step 5
    with pytest.raises(TrainingError, match="not finite at step 5"):
        train(config(tmp_path, **quiet), SyntheticLoader())
    assert len(calls) == 12  # found out at the save of step 6, which therefore does not happen
    assert (tmp_path / "latest_checkpointed_iteration.txt").read_text() == "4\n"
    train(config(tmp_path), SyntheticLoader())  # the run goes on from there
    assert [r["step"] for r in records(tmp_path, "start")] == [0, 4]


def test_training_learns_and_validation_leaves_it_alone(tmp_path: Path) -> None:
    class OneBatch(SyntheticLoader):
        def batch(self, number: int) -> dict[str, torch.Tensor]:
            return super().batch(1)

    changes = {"train_iters": 30, "optim.lr": 0.03, "checkpoint.save_interval": 0}
    train(config(tmp_path / "plain", **changes), OneBatch())
    train(config(tmp_path / "valid", **changes, eval_interval=10, eval_iters=2), OneBatch(), SyntheticLoader())
    plain, valid = ([r["loss"] for r in records(tmp_path / run, "train")] for run in ("plain", "valid"))
    assert plain == valid
    assert plain[-1] < 0.5 * plain[0]
    assert [r["step"] for r in records(tmp_path / "valid", "valid")] == [10, 20, 30]
    losses = [r["loss"] for r in records(tmp_path / "valid", "valid")]
    assert len(set(losses)) == 3  # the same batches, another model each time


def test_init_from_continues_a_saved_model(tmp_path: Path) -> None:
    first = config(tmp_path / "a")
    model = build_gpt_model(first.model, seed=77)
    save_model(model, first.model, tmp_path / "base")
    changes = {"model": None, "init_from": str(tmp_path / "base"), "train_iters": 1, "optim.lr_warmup_iters": 0}
    train(config(tmp_path / "b", **changes, **{"optim.lr": 1e-12}), SyntheticLoader())
    trained, got = load_checkpoint(tmp_path / "b" / "model")
    assert got == first.model
    for name, tensor in weight_state(model).items():
        torch.testing.assert_close(tensor, weight_state(trained)[name], rtol=0, atol=1e-6)


def test_the_settings_of_every_part_of_a_run_are_kept(tmp_path: Path) -> None:
    train(config(tmp_path, train_iters=3), SyntheticLoader())
    train(config(tmp_path, train_iters=6, **{"optim.lr": 0.005}), SyntheticLoader())
    kept = {file.name: json.loads(file.read_text()) for file in tmp_path.glob("config*.json")}
    assert {name: (values["train_iters"], values["optim"]["lr"]) for name, values in kept.items()} == {
        "config.json": (6, 0.005), "config_0000000.json": (3, 0.01), "config_0000003.json": (6, 0.005),
    }  # fmt: skip
    assert TrainConfig.from_dict(kept["config.json"]).optim.lr == 0.005
    for folder in tmp_path.glob("iter_*"):
        assert ModelConfig.from_json(folder / "model_config.json") == config(tmp_path).model
        assert TrainConfig.from_dict(json.loads((folder / "train_config.json").read_text())).optim.lr in (0.01, 0.005)


def test_a_preset_is_reached_by_its_name(tmp_path: Path) -> None:
    changes = {"model": None, "model_preset": "tiny", "train_iters": 1, "optim.lr_warmup_iters": 0}
    train(config(tmp_path, **changes), SyntheticLoader())
    assert load_checkpoint(tmp_path / "model")[1] == preset("tiny")
    with pytest.raises(ConfigError, match=r"unknown model preset 'qwen9', allowed: .*qwen2\.5-7b"):
        train(config(tmp_path / "b", **changes | {"model_preset": "qwen9"}), SyntheticLoader())
    with pytest.raises(ConfigError, match=r"\(2048\) must not exceed the model's max_sequence_length \(1024\)"):
        train(config(tmp_path / "c", **changes, **{"data.seq_length": 2048}), SyntheticLoader())
    with pytest.raises(ConfigError, match="exactly one of `model` and `model_preset`"):
        config(tmp_path, model_preset="tiny")


def test_bf16_keeps_float32_weights_and_stays_near_float32(tmp_path: Path) -> None:
    for dtype in ("bf16", "float32"):
        train(config(tmp_path / dtype, dtype=dtype, **{"checkpoint.save_interval": 0}), SyntheticLoader())
    losses = [[r["loss"] for r in records(tmp_path / dtype, "train")] for dtype in ("bf16", "float32")]
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)


def test_a_folder_with_a_checkpoint_is_refused_without_resume(tmp_path: Path) -> None:
    train(config(tmp_path, train_iters=1, **{"optim.lr_warmup_iters": 0}), SyntheticLoader())
    with pytest.raises(ConfigError, match="resume is false"):
        train(config(tmp_path, **{"checkpoint.resume": False}), SyntheticLoader())


@pytest.mark.parametrize("train_iters", [2, 3])
def test_a_run_that_is_at_its_end_or_beyond_does_not_ask_to_be_started_again(tmp_path: Path, train_iters: int) -> None:
    """A batch script starts a run again whose exit code says that a signal stopped it."""
    settings = {"optim.lr_warmup_iters": 0}
    train(config(tmp_path, train_iters=3, **settings), SyntheticLoader())
    loader = SyntheticLoader()
    if train_iters == 2:
        with pytest.raises(ConfigError, match=r"is at step 3 already, beyond train_iters \(2\): raise train_iters"):
            train(config(tmp_path, train_iters=2, **settings), loader)
    else:
        result = train(config(tmp_path, train_iters=3, **settings), loader)
        assert (result.step, result.stopped_by, result.model_folder) == (3, None, tmp_path / "model")
    assert not loader.seen


class UntrainedLoader(SyntheticLoader):
    """The first microbatches have no trained token."""

    def __init__(self, untrained: int) -> None:
        super().__init__()
        self.untrained = untrained

    def batch(self, number: int) -> dict[str, torch.Tensor]:
        batch = super().batch(number)
        return batch | {"loss_mask": batch["loss_mask"] * (number >= self.untrained)}


def test_steps_without_a_trained_token_are_told_and_a_run_of_them_is_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = {"log.log_interval": 3, "checkpoint.save_interval": 0}
    train(config(tmp_path / "a", **settings), UntrainedLoader(4))
    assert "2 of the 3 steps up to 3 trained no token" in caplog.text
    assert all(record["loss"] > 1 for record in records(tmp_path / "a", "train"))
    with pytest.raises(TrainingError, match="no token was trained up to step 3: every response is empty"):
        train(config(tmp_path / "b", **settings), UntrainedLoader(100))
    train(config(tmp_path / "c", **settings), SyntheticLoader(), UntrainedLoader(100))
    assert records(tmp_path / "c", "valid")[0]["loss"] is None  # not 0, which would look like a perfect model


def test_another_model_does_not_go_on_from_a_checkpoint(tmp_path: Path) -> None:
    train(config(tmp_path, train_iters=3), SyntheticLoader())
    before = (tmp_path / "iter_0000003" / "model_config.json").read_bytes()
    with pytest.raises(
        ConfigError, match=r"iter_0000003 was saved by a run of another model \(rotary_base 1000000.0 there"
    ):
        train(config(tmp_path, **{"model.rotary_base": 5e5}), SyntheticLoader())
    assert (tmp_path / "iter_0000003" / "model_config.json").read_bytes() == before


def test_a_line_that_a_crash_cut_off_is_not_continued(tmp_path: Path) -> None:
    train(config(tmp_path, train_iters=3), SyntheticLoader())
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(file.read_bytes()[:-30])
    train(config(tmp_path), SyntheticLoader())
    lines = file.read_text().splitlines()
    whole = [line for line in lines if line.endswith("}")]
    assert len(whole) == len(lines) - 1
    assert [json.loads(line)["resumed"] for line in whole if '"start"' in line] == [False, True]
