"""The training loop. Read `train` from top to bottom: everything a run does happens there.

This is the one-process loop. Where several ranks come in later: process groups and the batch's share in `train`
(DP), `forward_backward` gives way to megatron-core's schedules (PP), `build_optimizer` and `clip_gradients` to
megatron-core's DDP and distributed optimizer or to a DeepSpeed engine, `StopSignals.__bool__` all-reduces its flag.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from megatron_multiverse.checkpoints.load import load_checkpoint
from megatron_multiverse.config import LayerConfig, ModelConfig, TrainConfig, check_sequence_length
from megatron_multiverse.errors import ConfigError, TrainingError
from megatron_multiverse.files import write_json_atomic
from megatron_multiverse.kernels.multiverse_attention import AttentionCase, choose_backend
from megatron_multiverse.model.families import preset
from megatron_multiverse.model.gpt import build_gpt_model
from megatron_multiverse.model.weights import save_model
from megatron_multiverse.training.checkpoint import CheckpointManager, Stateful, TrainState
from megatron_multiverse.training.flops import peak_tflops
from megatron_multiverse.training.forward import Microbatch, arithmetic, forward_backward, validate
from megatron_multiverse.training.metrics import MetricsWriter, StepMeter, last_start
from megatron_multiverse.training.optim import NonFiniteGuard, build_optimizer, build_scheduler, clip_gradients
from megatron_multiverse.training.placement import TokenPlacer
from megatron_multiverse.training.seeds import seed_everything
from megatron_multiverse.training.signals import StopSignals, hold_signals

logger = logging.getLogger(__name__)


class Loader(Stateful, Protocol):
    """An endless stream of microbatches that knows where it stands."""

    def __iter__(self) -> Iterator[Microbatch]:
        """Continue from the current position."""
        ...


@dataclass(frozen=True)
class TrainResult:
    """How a run ended."""

    step: int
    """Optimizer steps done."""
    stopped_by: str | None
    """Name of the signal that stopped the run, None if it finished."""
    model_folder: Path | None
    """Folder of the final weights (load_model reads it), None if the run was stopped."""


def train(config: TrainConfig, loader: Loader | None = None, valid_loader: Loader | None = None) -> TrainResult:
    """Train, or go on training if `checkpoint.save` holds a checkpoint.

    Args:
        config: the run.
        loader: training data; default: what `config.data` describes.
        valid_loader: validation data; default likewise.

    Raises:
        ConfigError: settings that do not fit together, the data or the checkpoint.
        TrainingError: the loss or the gradient is not finite.
    """
    device = choose_device(config.device)
    seed_everything(config.seed)
    model, model_config = create_model(config, device)
    if loader is None:
        from megatron_multiverse.training.data import build_loaders

        loader, valid_loader = build_loaders(config.data, config.seed, model_config.vocab_size)
    optimizer = build_optimizer(model, config.optim)
    scheduler = build_scheduler(optimizer, config.optim, config.train_iters)
    state = TrainState(model, optimizer, scheduler, loader)
    checkpoints = CheckpointManager(config.checkpoint)
    resumed = checkpoints.resume(state)
    layers = layers_that_run(config, model, model_config, device)
    write_run_config(dataclasses.replace(config, layers=layers), model_config, checkpoints.folder, state.step)
    if resumed:
        warn_of_other_layers(last_start(checkpoints.folder), layers)
    metrics = MetricsWriter(checkpoints.folder, config.train_iters)
    metrics.start(state.step, resumed, model_config, layers)
    guard, meter, saved_step = NonFiniteGuard(device), StepMeter(device), state.step
    layouts, valid_layouts = (TokenPlacer(x, device, config.data.malformed) for x in (loader, valid_loader))
    peak, backend = peak_tflops(device, config.dtype, config.log.peak_tflops), config.layers.attention_backend

    with StopSignals() as stop, arithmetic(config), contextlib.closing(stream(loader)) as batches:
        while state.step < config.train_iters and not stop:
            waiting = time.perf_counter()
            microbatches = [next(batches) for _ in range(config.num_microbatches)]
            meter.waited_s += time.perf_counter() - waiting

            state.step += 1
            scheduler.step(1)
            result = forward_backward(model, microbatches, device, config.dtype, backend, layouts)
            grad_norm = clip_gradients(model.parameters(), config.optim.clip_grad)
            guard.step(optimizer, state.step, result.loss, grad_norm)
            optimizer.zero_grad(set_to_none=True)
            state.consumed_samples += config.data.global_batch_size
            meter.add(result.loss_sum, result.loss_tokens, result.tokens, result.visible_pairs, grad_norm)

            last = state.step == config.train_iters or bool(stop)
            if last or state.step % config.log.log_interval == 0:
                raise_if_not_finite(guard)
                layouts.report(state.step, metrics)
                numbers = meter.read(model_config, peak)
                metrics.train(state.step, numbers, optimizer.param_groups[0]["lr"], state.consumed_samples)
            validation_due = is_due(state.step, config.eval_interval) or (last and not stop)
            if valid_loader is not None and validation_due:
                run_validation(config, model, valid_loader, valid_layouts, device, backend, metrics, state.step)
                meter.reset()
            if last or is_due(state.step, config.checkpoint.save_interval):
                raise_if_not_finite(guard)
                layouts.report(state.step, metrics)  # a resumed run does not see these documents again
                checkpoints.save(state)
                saved_step = state.step
                meter.reset()

        if state.step != saved_step:  # a signal arrived between the end of a step and the loop's condition
            raise_if_not_finite(guard)
            layouts.report(state.step, metrics)
            checkpoints.save(state)
        finished = state.step == config.train_iters
        if finished:  # in here, so that a signal does not cut the writing off
            save_model(model, model_config, checkpoints.folder / "model")
    stopped_by = None if finished else stop.received
    metrics.write("end", state.step, stopped_by=stopped_by)
    metrics.close()
    if not finished:
        logger.info("stopped by %s after step %d; start again to go on", stopped_by, state.step)
    return TrainResult(state.step, stopped_by, checkpoints.folder / "model" if finished else None)


def stream(loader: Loader) -> Generator[Microbatch, None, None]:
    """The microbatches of a loader. Its worker processes start with the first one and end when it is closed.

    They do not hear SIGTERM, by which Python would end them at exit: whoever iterates must close.
    """
    batches = iter(loader)
    with hold_signals():
        first = next(batches)
    yield first
    yield from batches


def is_due(step: int, interval: int) -> bool:
    """True every `interval` steps; never if the interval is 0."""
    return interval > 0 and step % interval == 0


def choose_device(name: str) -> torch.device:
    """The device called "auto", "cpu" or "cuda". Raises ConfigError for cuda without a GPU."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device is cuda, but torch sees no GPU: set device to cpu or auto")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def create_model(config: TrainConfig, device: torch.device) -> tuple[nn.Module, ModelConfig]:
    """A fresh model from `config.model` or `config.model_preset`, or the saved one that `config.init_from` names."""
    dtype, compute_dtype = dtypes(config)
    if config.init_from is not None:
        model, model_config = load_checkpoint(
            config.init_from, dtype=dtype, device=device, layers=config.layers, compute_dtype=compute_dtype
        )
        check_sequence_length(config.data, model_config)
        return model, model_config
    model_config = config.model or preset(config.model_preset or "")  # TrainConfig checks that there is one
    check_sequence_length(config.data, model_config)
    model = build_gpt_model(
        model_config,
        dtype=dtype,
        device=device,
        seed=config.seed,
        layers=config.layers,
        compute_dtype=compute_dtype,
    )
    return model, model_config


def dtypes(config: TrainConfig) -> tuple[torch.dtype, torch.dtype]:
    """Of the weights, and of the matrix products."""
    dtype = torch.float64 if config.dtype == "float64" else torch.float32
    return dtype, torch.bfloat16 if config.dtype == "bf16" else dtype


def layers_that_run(
    config: TrainConfig, model: nn.Module, model_config: ModelConfig, device: torch.device
) -> LayerConfig:
    """The settings with "auto" replaced by what runs.

    Raises:
        ConfigError: the attention backend that was asked for cannot run here.
    """
    layers = config.layers
    built = getattr(getattr(model, "config", None), "transformer_impl", layers.transformer_impl)
    case = AttentionCase(device.type, dtypes(config)[1], model_config.kv_channels, deterministic=config.deterministic)
    backend = choose_backend(layers.attention_backend, case)
    return dataclasses.replace(layers, transformer_impl=built, attention_backend=backend)


def warn_of_other_layers(before: dict[str, Any] | None, layers: LayerConfig) -> None:
    """A run may go on with other layers, but its numbers are then not those of an uninterrupted one."""
    for name in ("transformer_impl", "attention_backend"):
        was, now = (before or {}).get(name, getattr(layers, name)), getattr(layers, name)
        if was != now:
            logger.warning(
                "the steps so far ran with layers.%s %s, this run goes on with %s: losses differ by rounding",
                name, was, now,
            )  # fmt: skip


def write_run_config(config: TrainConfig, model_config: ModelConfig, folder: Path, step: int) -> None:
    """Keep the config that runs beside the checkpoints: the newest, and which one was in force from which step on."""
    write_json_atomic(folder / "model_config.json", dataclasses.asdict(model_config))
    for name in ("config.json", f"config_{step:07d}.json"):
        write_json_atomic(folder / name, config.to_dict())


def raise_if_not_finite(guard: NonFiniteGuard) -> None:
    """Stop the run if a step had a non-finite loss or gradient (waits for the device)."""
    step = int(guard.first_bad_step)
    if step:
        raise TrainingError(
            f"loss or gradient norm is not finite at step {step}; no weight was updated from that step on and "
            "nothing was saved since. Look at the data of that step, lower optim.lr or optim.clip_grad, and start "
            "again: the run goes on from its last checkpoint"
        )


def run_validation(
    config: TrainConfig,
    model: nn.Module,
    loader: Loader,
    layouts: TokenPlacer,
    device: torch.device,
    backend: str,
    metrics: MetricsWriter,
    step: int,
) -> None:
    """Validate on the same batches every time; the training data and the generators do not move."""
    position = loader.state_dict()
    loss, count = validate(model, loader, config.eval_iters, device, config.dtype, backend, layouts)
    loader.load_state_dict(position)
    layouts.report(step, metrics)
    metrics.valid(step, loss, count)
