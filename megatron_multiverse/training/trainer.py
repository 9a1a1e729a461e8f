"""The training loop. Read `train` from top to bottom: all that a run does happens there, in steps that loop.py takes.

It decides when something happens. How a step is computed, and on which devices, is the engine's part (engine.py).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
from dataclasses import dataclass
from pathlib import Path

from megatron_multiverse.checkpoints.run_files import MODEL_FOLDER, STEP_FILE, why_outdated
from megatron_multiverse.config import ModelConfig, RLConfig, TrainConfig
from megatron_multiverse.errors import ConfigError
from megatron_multiverse.files import write_json_atomic, write_text_atomic
from megatron_multiverse.model.device import choose_device
from megatron_multiverse.parallel.ranks import Ranks
from megatron_multiverse.progress import step_bar
from megatron_multiverse.training.checkpoint import TrainState, explained
from megatron_multiverse.training.description import RunDescription
from megatron_multiverse.training.engine import EngineFactory, TrainEngine
from megatron_multiverse.training.fused_adamw import check_optimizer
from megatron_multiverse.training.loop import Loop, Observer
from megatron_multiverse.training.metrics import MetricsWriter
from megatron_multiverse.training.microbatches import Loader, Position, streaming
from megatron_multiverse.training.one_process import OneProcessEngine
from megatron_multiverse.training.run_folder import RunFolder
from megatron_multiverse.training.saver import Saver
from megatron_multiverse.training.seeds import seed_everything
from megatron_multiverse.training.signals import StopSignals, listening
from megatron_multiverse.training.start import create_chunks, create_model, describe_model, joined_groups
from megatron_multiverse.training.trackers import check_trackers, open_trackers

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
    *,
    stop: StopSignals | None = None,
    observe: Observer | None = None,
) -> TrainResult:
    """Train, or go on training if `checkpoint.save` holds a checkpoint.

    Args:
        config: the run.
        loader: training data; default: what `config.data` describes.
        valid_loader: validation data; default likewise.
        make_engine: builds what computes the steps; default: `build_engine`.
        stop: signals that the caller listens to, from before the run until after it; default: those during the steps.
        observe: called after each validation with the engine, the step and the metrics.

    Raises:
        CheckpointError: the run folder or a checkpoint cannot be used, read or written.
        ConfigError: settings that do not fit together, the data, the checkpoint or what is installed.
        TrainingError: the loss or the gradient is not finite, or no token is trained.
    """
    check_trackers(config.log)
    check_optimizer(config, choose_device(config.device))
    model_config, tokenizer = describe_model(config), None
    if loader is None:
        from megatron_multiverse.training.data import build_loaders, open_tokenizer

        tokenizer = open_tokenizer(config, model_config.vocab_size)
    with joined_groups(config) as ranks, RunFolder(config.checkpoint, ranks) as run:
        check_not_past(config, run)
        seed_everything(config.seed)
        if loader is None:
            assert tokenizer is not None  # it was opened above
            loader, valid_loader = build_loaders(config, tokenizer)
        check_agreement(config, loader, ranks)
        engine = (make_engine or build_engine)(config, model_config, loader, valid_loader)
        state = TrainState(engine, loader)
        described = dataclasses.replace(config, layers=engine.layers)
        description = RunDescription(model_config, described, tokenizer)
        resumed = run.resume(state, description)
        metrics = start_record(description, run.folder if ranks.is_first else None, state.step, resumed)
        saver = Saver(run, state, description, metrics)
        loop = Loop(config, model_config, state, metrics, saver, ranks)

        with (
            listening(stop) as stop,
            engine.running(),
            streaming(loader) as batches,
            step_bar(config.train_iters, state.step, shown=ranks.is_first) as advance,
        ):
            is_stopping = ranks.any(bool(stop))
            while state.step < config.train_iters and not is_stopping:
                loop.step(batches)
                advance()
                is_stopping = ranks.any(bool(stop))
                last = state.step == config.train_iters or is_stopping
                if last or is_due(state.step, config.log.log_interval):
                    loop.log()
                validation_due = is_due(state.step, config.eval_interval) or (last and not is_stopping)
                if valid_loader is not None and validation_due:
                    loop.validate(valid_loader)
                    # This takes long, and so does a save: a signal that came meanwhile waits for no further step.
                    is_stopping = ranks.any(bool(stop))
                    if observe is not None and not is_stopping:
                        loop.observe(observe)
                        is_stopping = ranks.any(bool(stop))
                if last or is_stopping or is_due(state.step, config.checkpoint.save_interval):
                    loop.save()
                    is_stopping = ranks.any(bool(stop))
            saver.finish()
            finished = state.step >= config.train_iters
            if finished:  # inside the block, so that a signal does not cut the writing off
                save_model(state, description, run.folder / MODEL_FOLDER, ranks)
        return end_run(run, state.step, finished, stop, metrics)


def end_run(run: RunFolder, step: int, finished: bool, stop: StopSignals, metrics: MetricsWriter) -> TrainResult:
    """Write down how a run ended. One that is not finished was stopped by a signal, to this rank or another one."""
    stopped_by = None if finished else stop.received
    metrics.write("end", step, stopped_by=stopped_by)
    metrics.close()
    if not finished:
        logger.info("stopped by %s after step %d; start again to go on", stopped_by, step)
        if run.ranks.is_first and (outdated := why_outdated(run.folder / MODEL_FOLDER)) is not None:
            logger.warning("%s", outdated)
    return TrainResult(step, stopped_by, run.folder / MODEL_FOLDER if finished else None)


def check_not_past(config: TrainConfig | RLConfig, run: RunFolder) -> None:
    """A run cannot end before the step at which it goes on.

    Raises:
        ConfigError: the checkpoint in force is beyond `train_iters`.
    """
    if run.start_step is not None and run.start_step > config.train_iters:
        raise ConfigError(
            f"{run.folder} is at step {run.start_step} already, beyond train_iters ({config.train_iters}): raise "
            "train_iters, or name another folder in checkpoint.save"
        )
    if run.start_step == config.train_iters:
        logger.info("%s is at step %d already: nothing is left to train", run.folder, run.start_step)


def is_due(step: int, interval: int) -> bool:
    """True every `interval` steps; never if the interval is 0."""
    return interval > 0 and step % interval == 0


def check_agreement(config: TrainConfig | RLConfig, data: Position, ranks: Ranks) -> None:
    """Raise ConfigError on every rank unless all have the same settings and stand at the same place in the same data:
    otherwise they would wait for each other, or train parts of different models."""
    settings = hashlib.sha256(json.dumps(config.to_dict(), sort_keys=True).encode()).hexdigest()[:12]
    remedy = "start every rank with the same config file and flags"
    ranks.check_same("the hash of the configuration", settings, remedy)
    remedy = "copy the same data files to every host, or put them on a shared file system"
    ranks.check_same("the state of the training data", data.state_dict(), remedy)


def build_engine(
    config: TrainConfig, model_config: ModelConfig, loader: Loader, valid_loader: Loader | None
) -> TrainEngine:
    """The engine that the config asks for; see `EngineFactory`."""
    device = choose_device(config.device)
    if config.runs_on == "deepspeed":
        from megatron_multiverse.training.zero import build_zero_engine

        return build_zero_engine(config, model_config, device, loader, valid_loader)
    if config.runs_on == "megatron":
        from megatron_multiverse.training.megatron import MegatronEngine

        chunks, layers = create_chunks(config, model_config, device)
        return MegatronEngine(config, chunks, model_config, layers, loader, valid_loader)
    model, layers = create_model(config, model_config, device)
    return OneProcessEngine(config, model, model_config, layers, loader, valid_loader)


def start_record(description: RunDescription, folder: Path | None, step: int, resumed: bool) -> MetricsWriter:
    """Write down in the run folder what runs from this step on, and open the metrics.

    The config is kept as the newest, and as the one in force from this step on.

    Args:
        description: of the run.
        folder: the run folder; None on ranks that write nothing.
        step: optimizer steps done.
        resumed: the run continues from a checkpoint.
    """
    config = description.config
    trackers = [] if folder is None else open_trackers(config.log, folder, step, config.to_dict())
    with explained(f"{folder} cannot be written", "free space or correct the rights, then start again"):
        if folder is not None:
            for name in ("config.json", f"config_{step:07d}.json"):
                write_json_atomic(folder / name, config.to_dict())
        metrics = MetricsWriter(folder, config.train_iters, trackers)
        metrics.start(step, resumed, description.model, config.layers)
    return metrics


def save_model(state: TrainState, description: RunDescription, folder: Path, ranks: Ranks) -> None:
    """Write the final weights with their tokenizer and their step, so that the folder is whole by itself.

    Raises:
        CheckpointError: it cannot be written.
    """
    with explained(f"{folder} cannot be written", "free space or correct the rights, then start again"):
        if ranks.is_first:
            (folder / STEP_FILE).unlink(missing_ok=True)  # it vouches for the weights that are replaced now
        state.engine.save_model(folder)
        if ranks.is_first:
            description.write_tokenizer(folder)
            write_text_atomic(folder / STEP_FILE, f"{state.step}\n")
