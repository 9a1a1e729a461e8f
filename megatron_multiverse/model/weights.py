"""A model as a folder: config.json and model.safetensors under megatron-core's names. No training state.

The names are those of the local layer spec, whatever the model was built with (`weight_names.py`).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from megatron_multiverse.checksums import CHECKSUMS_FILE, checksum, write_checksums
from megatron_multiverse.config import ModelConfig
from megatron_multiverse.errors import ConfigError
from megatron_multiverse.files import flush
from megatron_multiverse.kernels.fused_linear import FP8, quantize_rows
from megatron_multiverse.model.mcore import pipeline_parallel_size, tensor_parallel_place
from megatron_multiverse.weight_names import is_extra_state, plain_name

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
SCALE = ".weight_scale"
"""How the names of scales end that stand beside weights of FP8."""


def weight_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """The weights of a model by plain name; modules' extra states are left out."""
    return {plain_name(name): t for name, t in model.state_dict().items() if not is_extra_state(name)}


@torch.no_grad()
def copy_weights(source: nn.Module, target: nn.Module) -> None:
    """Copy the weights of a model into another of the same shape, see `copy_tensors`.

    Raises:
        ConfigError: the models have different weights.
    """
    given, wanted = weight_state(source), weight_state(target)
    misfits = given.keys() ^ {name for name in wanted if name in given or not name.endswith(SCALE)}
    misfits |= {name for name in given.keys() & wanted.keys() if given[name].shape != wanted[name].shape}
    if misfits:
        raise ConfigError(
            f"the models differ in {len(misfits)} weights, e.g. {min(misfits)}: copy between models of one shape"
        )
    copy_tensors(given, target)


@torch.no_grad()
def copy_tensors(given: Mapping[str, torch.Tensor], target: nn.Module) -> None:
    """Copy some weights into a model, in place, each in the dtype and on the device of the target: tensors that an
    engine holds stay the ones it holds. Those that an engine has rounded to FP8 are rounded anew, from the format of
    the target's other weights, as when the engine was made.

    Args:
        given: by plain name, of the target's shapes.
        target: the model.
    """
    state = weight_state(target)
    format_of_others = next(t.dtype for name, t in state.items() if t.dtype != FP8 and not name.endswith(SCALE))
    for name, value in given.items():
        if (scale := state.get(f"{name}_scale")) is None:
            state[name].copy_(value)
        else:
            rounded, new_scale = quantize_rows(value.to(state[name].device, format_of_others))
            state[name].copy_(rounded)
            scale.copy_(new_scale)


def save_model(model: nn.Module, config: ModelConfig, folder: str | Path, *, dtype: torch.dtype | None = None) -> None:
    """Write the weights and the config; `checkpoints.load.load_checkpoint` reads them.

    Args:
        model: the model.
        config: its config.
        folder: created if missing; files of an earlier save in it are replaced.
        dtype: dtype on disk, e.g. torch.bfloat16 to halve the file; None keeps the model's.

    Raises:
        ConfigError: this rank holds only a part of the model, which would be written as if it were the whole.
    """
    tp, pp = tensor_parallel_place()[0], pipeline_parallel_size()
    if (tp, pp) != (1, 1):
        raise ConfigError(
            f"save_model writes a whole model, but this one is spread over {tp} tensor x {pp} pipeline parallel ranks: "
            "save a torch_dist checkpoint with megatron-core's dist_checkpointing, which every tool here reads"
        )
    tensors = {n: t.detach().to("cpu", dtype or t.dtype).contiguous() for n, t in weight_state(model).items()}
    write_weights(tensors, config, folder)


def write_weights(tensors: dict[str, torch.Tensor], config: ModelConfig, folder: str | Path) -> None:
    """Write the weights of a whole model by plain name, on the CPU and contiguous, and its config.

    Args:
        tensors: the weights.
        config: of the whole model.
        folder: created if missing; files of an earlier save in it are replaced.
    """
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    weights_part, config_part = (path / f"{name}.partial" for name in (WEIGHTS_FILE, CONFIG_FILE))
    save_file(tensors, weights_part, metadata={"format": "pt"})
    weights_part.chmod(0o644)  # safetensors makes it readable by its owner only
    config.to_json(config_part)
    for part in (weights_part, config_part):  # both are whole before the first old file goes
        flush(part)
    (path / CHECKSUMS_FILE).unlink(missing_ok=True)  # it vouches for the weights that are replaced now
    os.replace(weights_part, path / WEIGHTS_FILE)
    os.replace(config_part, path / CONFIG_FILE)
    write_checksums(path, {WEIGHTS_FILE: checksum(path / WEIGHTS_FILE)})
    flush(path)
