"""The training loop. Read `train` from top to bottom: everything a run does happens there.

It decides when something happens. How a step is computed, and on which devices, is the engine's part (engine.py).
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import time
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn

from megatron_multiverse.checkpoints.load import load_checkpoint
from megatron_multiverse.checkpoints.run_files import MODEL_CONFIG_FILE
from megatron_multiverse.checkpoints.sources import open_checkpoint
from megatron_multiverse.config import LayerConfig, ModelConfig, TrainConfig, check_sequence_length
from megatron_multiverse.files import write_json_atomic
from megatron_multiverse.kernels.multiverse_attention import choose_backend
from megatron_multiverse.model.device import choose_device
from megatron_multiverse.model.families import preset
from megatron_multiverse.model.gpt import attention_case, build_gpt_model
from megatron_multiverse.training.checkpoint import CheckpointManager, TrainState
from megatron_multiverse.training.engine import EngineFactory, TrainEngine
from megatron_multiverse.training.metrics import MetricsWriter, StepMeter, last_start
from megatron_multiverse.training.microbatches import Loader, stream
from megatron_multiverse.training.one_process import OneProcessEngine
from megatron_multiverse.training.seeds import seed_everything
from megatron_multiverse.training.signals import StopSignals

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainResult:
    """How a run ended."""

    step: int
    """Optimizer steps done."""
    stopped_by: str | None
    """Name of the signal that stopped the run, None if it finished."""
    model_folder: Path | None
    """Folder of the final weights, which `load_checkpoint` reads; None if the run was stopped."""


def train(
    config: TrainConfig,
    loader: Loader | None = None,
    valid_loader: Loader | None = None,
    make_engine: EngineFactory | None = None,
) -> TrainResult:
    """Train, or go on training if `checkpoint.save` holds a checkpoint.

    Args:
        config: the run.
        loader: training data; default: what `config.data` describes.
        valid_loader: validation data; default likewise.
        make_engine: builds what computes the steps; default: `build_engine`.

    Raises:
        ConfigError: settings that do not fit together, the data or the checkpoint.
        TrainingError: the loss or the gradient is not finite.
    """
    seed_everything(config.seed)
    model_config = describe_model(config)
    if loader is None:
        from megatron_multiverse.training.data import build_loaders

        loader, valid_loader = build_loaders(config.data, config.seed, model_config.vocab_size)
    engine = (make_engine or build_engine)(config, model_config, loader, valid_loader)
    state = TrainState(engine, loader)
    checkpoints = CheckpointManager(config.checkpoint)
    resumed = checkpoints.resume(state)
    metrics = start_record(config, model_config, engine.layers, checkpoints.folder, state.step, resumed)
    meter, saved_step = StepMeter(engine.device), state.step

    with StopSignals() as stop, engine.running(), contextlib.closing(stream(loader)) as batches:
        while state.step < config.train_iters and not stop:
            waiting = time.perf_counter()
            microbatches = [next(batches) for _ in range(config.num_microbatches)]
            meter.waited_s += time.perf_counter() - waiting

            result = engine.step(microbatches)
            state.step += 1
            state.consumed_samples += config.data.global_batch_size
            meter.add(result.loss_sum, result.loss_tokens, result.tokens, result.visible_pairs, result.grad_norm)

            last = state.step == config.train_iters or bool(stop)
            if last or state.step % config.log.log_interval == 0:
                engine.check(metrics)
                numbers = meter.read(model_config, engine.peak_tflops)
                metrics.train(state.step, numbers, engine.learning_rate, state.consumed_samples)
            validation_due = is_due(state.step, config.eval_interval) or (last and not stop)
            if valid_loader is not None and validation_due:
                run_validation(engine, valid_loader, config.eval_iters, metrics, state.step)
                meter.reset()
            if last or is_due(state.step, config.checkpoint.save_interval):
                engine.check(metrics)  # names documents trained as plain text: a resumed run starts after them
                checkpoints.save(state)
                saved_step = state.step
                meter.reset()

        if state.step != saved_step:  # a signal arrived between the end of a step and the loop's condition
            engine.check(metrics)
            checkpoints.save(state)
        finished = state.step == config.train_iters
        if finished:  # inside the block, so that a signal does not cut the writing off
            engine.save_model(checkpoints.folder / "model")
    stopped_by = None if finished else stop.received
    metrics.write("end", state.step, stopped_by=stopped_by)
    metrics.close()
    if not finished:
        logger.info("stopped by %s after step %d; start again to go on", stopped_by, state.step)
    return TrainResult(state.step, stopped_by, checkpoints.folder / "model" if finished else None)


def is_due(step: int, interval: int) -> bool:
    """True every `interval` steps; never if the interval is 0."""
    return interval > 0 and step % interval == 0


def run_validation(engine: TrainEngine, loader: Loader, iters: int, metrics: MetricsWriter, step: int) -> None:
    """Validate on the same microbatches every time; the training data and the generators do not move."""
    position = loader.state_dict()
    loss, count = engine.validate(islice(loader, iters))
    loader.load_state_dict(position)
    engine.check(metrics)
    metrics.valid(step, loss, count)


def describe_model(config: TrainConfig) -> ModelConfig:
    """Shape of the model to train: `config.model`, `config.model_preset`, or the saved one's of `config.init_from`.

    Raises:
        CheckpointError: `config.init_from` is no checkpoint.
        ConfigError: there is no such preset, or the rows of the data are longer than the model allows.
    """
    if config.init_from is not None:
        model_config = open_checkpoint(config.init_from).config
    else:
        model_config = config.model or preset(config.model_preset or "")  # TrainConfig checks that there is one
    check_sequence_length(config.data, model_config)
    return model_config


def build_engine(
    config: TrainConfig, model_config: ModelConfig, loader: Loader, valid_loader: Loader | None
) -> TrainEngine:
    """The engine that the config asks for; see `EngineFactory`."""
    model, layers = create_model(config, model_config, choose_device(config.device))
    return OneProcessEngine(config, model, model_config, layers, loader, valid_loader)


def create_model(config: TrainConfig, model_config: ModelConfig, device: torch.device) -> tuple[nn.Module, LayerConfig]:
    """A model with fresh weights, or with those that `config.init_from` names.

    Returns:
        The model, and `config.layers` with every "auto" replaced by what runs.

    Raises:
        ConfigError: what `config.layers` asks for cannot run on `device`.
    """
    dtype, compute_dtype = dtypes(config)
    # The one place where a run chooses its attention backend. From here on its name is passed along and recorded.
    case = attention_case(model_config, device, compute_dtype, deterministic=config.deterministic)
    backend: Any = choose_backend(config.layers.attention_backend, case)
    layers = dataclasses.replace(config.layers, attention_backend=backend)
    if config.init_from is not None:
        model, _ = load_checkpoint(
            config.init_from, dtype=dtype, device=device, layers=layers, compute_dtype=compute_dtype
        )
    else:
        model = build_gpt_model(
            model_config, dtype=dtype, device=device, seed=config.seed, layers=layers, compute_dtype=compute_dtype
        )
    return model, dataclasses.replace(layers, transformer_impl=model.config.transformer_impl)


def dtypes(config: TrainConfig) -> tuple[torch.dtype, torch.dtype]:
    """(dtype of the weights, dtype of the matrix products)."""
    dtype = torch.float64 if config.dtype == "float64" else torch.float32
    return dtype, torch.bfloat16 if config.dtype == "bf16" else dtype


def start_record(
    config: TrainConfig, model_config: ModelConfig, layers: LayerConfig, folder: Path, step: int, resumed: bool
) -> MetricsWriter:
    """Write down beside the checkpoints what runs from this step on, and open the metrics.

    Args:
        config: the run.
        model_config: shape of its model.
        layers: how its layers are computed, without any "auto".
        folder: the run folder.
        step: optimizer steps done.
        resumed: the run continues from a checkpoint.
    """
    write_run_config(dataclasses.replace(config, layers=layers), model_config, folder, step)
    if resumed:
        warn_of_other_layers(last_start(folder), layers)
    metrics = MetricsWriter(folder, config.train_iters)
    metrics.start(step, resumed, model_config, layers)
    return metrics


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
    write_json_atomic(folder / MODEL_CONFIG_FILE, dataclasses.asdict(model_config))
    for name in ("config.json", f"config_{step:07d}.json"):
        write_json_atomic(folder / name, config.to_dict())
