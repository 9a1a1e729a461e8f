"""Training checkpoints: megatron-core's `torch_dist` format, written atomically.

A run folder holds `iter_0000100/`, `iter_0000200/`, ... and `latest_checkpointed_iteration.txt` (Megatron's names).
A checkpoint is written to `iter_0000200.partial`, flushed to disk, renamed, and only then named in the pointer file,
so a crash at any moment leaves a complete checkpoint in force; the next save replaces what a crash left. A step that
is saved again steps aside as `iter_0000200.replaced` until the new one stands.

Saving starts a helper process (megatron-core does), which imports the main script: a script that trains must have
the `if __name__ == "__main__":` guard, or it would train again inside the helper.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.optimizer import (
    get_param_id_to_sharded_param_map,
    make_sharded_optimizer_tensor,
)
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer.utils import make_sharded_object_for_checkpoint
from torch import nn

from megatron_multiverse.checkpoints.run_files import ITERATION_GLOB, POINTER_FILE, iteration_folder, step_of
from megatron_multiverse.config import CheckpointConfig
from megatron_multiverse.errors import CheckpointError, ConfigError
from megatron_multiverse.files import flush, write_text_atomic
from megatron_multiverse.model.cpu import device_neutral_cuda
from megatron_multiverse.training.seeds import rng_state, set_rng_state
from megatron_multiverse.training.signals import hold_signals
from megatron_multiverse.weight_names import (
    FINAL_EXTRA_STATE,
    extra_state_modules,
    is_extra_state,
    layer_extra_state,
)

logger = logging.getLogger(__name__)


class Stateful(Protocol):
    """Anything whose position belongs into a checkpoint, e.g. the data loader."""

    def state_dict(self) -> dict[str, Any]:
        """Position as plain values."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from that position."""
        ...


@dataclass
class TrainState:
    """Everything that changes while training, i.e. everything a checkpoint holds."""

    model: nn.Module
    optimizer: torch.optim.AdamW
    scheduler: OptimizerParamScheduler
    loader: Stateful
    step: int = 0
    """Optimizer steps done."""
    consumed_samples: int = 0
    """Rows trained on so far."""


def _sharded_optimizer_state(state: TrainState, model_state: dict[str, Any]) -> dict[str, Any]:
    """AdamW's tensors as sharded tensors named after their parameters, so that TP and PP may change."""
    parameters = [p for group in state.optimizer.param_groups for p in group["params"]]
    by_id = get_param_id_to_sharded_param_map(model_state, parameters)
    sharded: dict[str, Any] = {}
    for number, parameter in enumerate(parameters):
        values = state.optimizer.state[parameter]
        for name in ("exp_avg", "exp_avg_sq"):
            if name not in values:  # before the first step (and when loading): room for the values
                values[name] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            key = f"{number}.{name}"
            sharded[key] = make_sharded_optimizer_tensor(by_id[number], values[name], f"optimizer.state.{name}")
    return sharded


def _sharded_state(state: TrainState) -> dict[str, Any]:
    """The tensors of a checkpoint, placed in the global model."""
    model_state = state.model.sharded_state_dict(metadata={})  # type: ignore[operator]
    return {"model": model_state, "optimizer": _sharded_optimizer_state(state, model_state)}


def _missing_extra_states(model: Any, present: dict[str, Any]) -> dict[str, Any]:
    """Empty extra states of the other layer spec's modules: a Megatron that uses it asks for them."""
    config, keys = model.config, {value.key for value in present.values()}
    layers = config.num_layers
    wanted: list[tuple[str, list[tuple[int, int, int]]]] = [
        (layer_extra_state(module), [(0, layer.layer_number - 1, layers)])
        for layer in model.decoder.layers
        for module in extra_state_modules(qk_layernorm=config.qk_layernorm)
    ]
    if model.post_process:
        wanted.append((FINAL_EXTRA_STATE, []))
    return {
        f"{key}/{offsets}": make_sharded_object_for_checkpoint(None, key, offsets)
        for key, offsets in wanted
        if key not in keys
    }


def save_state(state: TrainState, folder: Path) -> None:
    """Write the state into an empty folder."""
    steps = [v["step"] for v in state.optimizer.state.values() if "step" in v]
    common = {
        "checkpoint_version": 3.0,
        "iteration": state.step,
        "consumed_samples": state.consumed_samples,
        "optimizer_step": float(steps[0]) if steps else 0.0,
        "opt_param_scheduler": state.scheduler.state_dict(),
        "rng_state": rng_state(),
        "data_loader": state.loader.state_dict(),
    }
    with device_neutral_cuda(), _quiet(), hold_signals():
        sharded = _sharded_state(state)
        sharded["other_spec"] = _missing_extra_states(state.model, sharded["model"])
        dist_checkpointing.save({**sharded, **common}, str(folder))


def load_state(state: TrainState, folder: Path) -> None:
    """Read a checkpoint into the state, in place, random generators included."""
    wanted = _sharded_state(state)
    # The layer specs differ in the modules that have an extra state; weights and optimizer state go into either.
    wanted["model"] = {name: value for name, value in wanted["model"].items() if not is_extra_state(name)}
    with device_neutral_cuda(), _quiet():
        loaded = dist_checkpointing.load(wanted, str(folder))
    _load_weights(state.model, loaded["model"], folder)
    parameters = [p for group in state.optimizer.param_groups for p in group["params"]]
    for number, parameter in enumerate(parameters):
        values = state.optimizer.state[parameter]
        for name in ("exp_avg", "exp_avg_sq"):
            values[name] = loaded["optimizer"][f"{number}.{name}"].to(parameter.device)
        values["step"] = torch.tensor(loaded["optimizer_step"], dtype=torch.float32, device=parameter.device)
    _warn_of_another_schedule(state.scheduler, loaded["opt_param_scheduler"])
    state.scheduler.load_state_dict(loaded["opt_param_scheduler"])
    state.loader.load_state_dict(loaded["data_loader"])
    set_rng_state(loaded["rng_state"])
    state.step = loaded["iteration"]
    state.consumed_samples = loaded["consumed_samples"]


def _load_weights(model: nn.Module, weights: dict[str, Any], folder: Path) -> None:
    missing, unexpected = model.load_state_dict(weights, strict=False)
    misfits = [name for name in missing if not is_extra_state(name)] + unexpected
    if misfits:
        raise CheckpointError(f"{folder}: weights do not fit the model, e.g. {misfits[0]}")


def _warn_of_another_schedule(scheduler: OptimizerParamScheduler, saved: dict[str, Any]) -> None:
    """The run follows its config from here on, but it is not the run that the config alone would have made."""
    names = ["max_lr", "lr_warmup_steps", "lr_decay_style"]
    if scheduler.lr_decay_style != "constant":
        names += ["min_lr", "lr_decay_steps"]
    differing = [name for name in names if saved[name] != getattr(scheduler, name)]
    if differing:
        what = ", ".join(f"{name}: was {saved[name]}, now {getattr(scheduler, name)}" for name in differing)
        logger.warning(
            "the learning rate schedule differs from that of the steps done so far (%s); set optim.lr_decay_iters "
            "where a longer run must equal one that was never interrupted",
            what,
        )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence torch's FutureWarnings about parts of it that megatron-core still uses."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


class CheckpointManager:
    """Names, atomicity and clean-up of the checkpoints of one run folder."""

    def __init__(self, config: CheckpointConfig) -> None:
        self.config = config
        self.folder = Path(config.save)
        self.folder.mkdir(parents=True, exist_ok=True)

    def folder_of(self, step: int) -> Path:
        """Folder of the checkpoint of a step."""
        return self.folder / iteration_folder(step)

    def _left_over(self, suffix: str) -> Iterator[Path]:
        """Folders that a save which was cut off has left."""
        return self.folder.glob(ITERATION_GLOB + suffix)

    def latest(self) -> int | None:
        """Step of the newest complete checkpoint, or None.

        Raises:
            CheckpointError: the pointer file names a checkpoint that is not there.
        """
        pointer = self.folder / POINTER_FILE
        if not pointer.is_file():
            return None
        self._recover()
        text = pointer.read_text().strip()
        if not text.isdigit() or not self.folder_of(int(text)).is_dir():
            raise CheckpointError(
                f"{pointer} names {text!r}, but there is no such checkpoint: write the number of an existing "
                "iter_ folder into it, or delete it to start over"
            )
        return int(text)

    def resume(self, state: TrainState) -> bool:
        """Load the newest checkpoint, if there is one. Returns True if the run continues.

        Raises:
            ConfigError: there is one, but `checkpoint.resume` is false.
        """
        step = self.latest()
        if step is None:
            return False
        if not self.config.resume:
            raise ConfigError(
                f"{self.folder} already holds a checkpoint (step {step}) and checkpoint.resume is false: "
                "choose another folder in checkpoint.save or set checkpoint.resume to true"
            )
        load_state(state, self.folder_of(step))
        logger.info("resumed from %s", self.folder_of(step))
        return True

    def save(self, state: TrainState, write: Callable[[TrainState, Path], None] = save_state) -> Path:
        """Write a checkpoint of the state's step and make it the newest one."""
        started = time.perf_counter()
        target = self.folder_of(state.step)
        partial, replaced = (target.with_name(target.name + suffix) for suffix in (".partial", ".replaced"))
        self._recover()
        for leftover in (*self._left_over(".partial"), *self._left_over(".replaced")):
            shutil.rmtree(leftover)
        partial.mkdir()
        write(state, partial)
        for file in partial.rglob("*"):
            flush(file)
        flush(partial)
        if target.exists():  # the same step again, e.g. after a run went back to an older checkpoint
            os.rename(target, replaced)
        os.rename(partial, target)
        flush(self.folder)  # the pointer must not reach the disk before the name it holds
        write_text_atomic(self.folder / POINTER_FILE, f"{state.step}\n")
        if replaced.exists():
            shutil.rmtree(replaced)
        self._prune(state.step)
        logger.info("saved %s in %.1f s", target, time.perf_counter() - started)
        return target

    def _recover(self) -> None:
        """Put a checkpoint back if a crash came between its stepping aside and its replacement."""
        for replaced in self._left_over(".replaced"):
            target = replaced.with_suffix("")
            if not target.exists():
                os.rename(replaced, target)
                flush(self.folder)
                logger.warning("the last save of %s was cut off; the one before it is in force", target)

    def _prune(self, newest: int) -> None:
        """Delete all but the newest `keep_last` checkpoints."""
        if self.config.keep_last == 0:
            return
        steps = sorted(step for f in self.folder.glob(ITERATION_GLOB) if (step := step_of(f.name)) is not None)
        for step in [s for s in steps if s != newest][: max(0, len(steps) - self.config.keep_last)]:
            doomed = self.folder / f"{self.folder_of(step).name}.partial"  # never half a checkpoint under a whole name
            os.rename(self.folder_of(step), doomed)
            shutil.rmtree(doomed)
