"""Our training config as DeepSpeed's, together with what the user's own DeepSpeed JSON adds to it.

DeepSpeed reads a misspelt key at the top level as if it were not there, and a value that contradicts the training loop
makes it count other steps than ours. So the user's file is read by a list of what is known (docs/decisions.md, entry
31): each value is either one that our config decides, and then has to agree, or a setting of DeepSpeed's own.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_multiverse.config import TrainConfig
from megatron_multiverse.errors import ConfigError

OWN_SETTINGS = {
    "aio", "comms_logger", "communication_data_type", "data_types", "flops_profiler", "gradient_predivide_factor",
    "memory_breakdown", "prescale_gradients", "steps_per_print", "wall_clock_breakdown", "zero_optimization",
}  # fmt: skip
"""Keys at the top of a DeepSpeed JSON, or sections of it, that are passed on."""
REPLACED: dict[tuple[str, ...], str] = {
    ("zero_optimization", "cpu_offload"): "offload_optimizer",
    ("zero_optimization", "cpu_offload_param"): "offload_param",
}
"""DeepSpeed's old names of settings that our config decides."""
_UNTIL_THE_END = 2**31


def check_deepspeed(config: TrainConfig) -> None:
    """Find out on every rank, before a GPU is touched, whether a run with `engine: deepspeed` can start.

    Raises:
        ConfigError: the package is missing, or `deepspeed.config` cannot be read or contradicts `config`.
    """
    deepspeed_config(config)
    if importlib.util.find_spec("deepspeed") is None:
        raise ConfigError(
            "engine deepspeed needs the package deepspeed, which is not installed: "
            "pip install -c requirements/constraints-cpu.txt -e '.[deepspeed]' (constraints-gpu.txt on a GPU machine), "
            "or set engine to megatron"
        )


def deepspeed_config(config: TrainConfig, *, on_gpu: bool = False) -> dict[str, Any]:
    """What `deepspeed.initialize` is given.

    Args:
        config: the run.
        on_gpu: whether the ranks compute on GPUs, from which pinned host memory is reached faster.

    Raises:
        ConfigError: `deepspeed.config` cannot be read, holds something unknown, or contradicts `config`.
    """
    decided = _decided(config)
    settings: dict[str, Any] = {
        "steps_per_print": _UNTIL_THE_END,  # the log lines are ours
        # torch's fused AdamW updates offloaded weights, too: no extension has to be compiled.
        "zero_force_ds_cpu_optimizer": False,
        # Gradients are added up over ranks and microbatches in float32, as by the other engines.
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
        # Otherwise zero.Init replaces torch.nn.functional.linear for the whole process.
        "zero_optimization": {"memory_efficient_linear": False},
    }
    _merge(settings, {key: value for key, value in decided.items() if key not in _CHECKED_ONLY})
    for name in ("offload_optimizer", "offload_param"):
        if settings["zero_optimization"][name]["device"] != "none":
            settings["zero_optimization"][name]["pin_memory"] = on_gpu
    if config.deepspeed.config is not None:
        _merge(settings, _further(Path(config.deepspeed.config), decided))
    return settings


_CHECKED_ONLY = ("optimizer", "train_batch_size")
"""The optimizer is built by us, and DeepSpeed works the batch out of the rest."""


def _decided(config: TrainConfig) -> dict[str, Any]:
    """Everything in DeepSpeed's words that our config decides."""
    optim, data, zero = config.optim, config.data, config.deepspeed
    return {
        "train_batch_size": data.global_batch_size,
        "train_micro_batch_size_per_gpu": data.micro_batch_size,
        "gradient_accumulation_steps": config.num_microbatches,
        "gradient_clipping": optim.clip_grad,
        "bf16": {"enabled": config.dtype == "bf16"},
        "fp16": {"enabled": False},
        "optimizer": {
            "type": "AdamW",
            "params": {
                "lr": optim.lr,
                "betas": [optim.adam_beta1, optim.adam_beta2],
                "eps": optim.adam_eps,
                "weight_decay": optim.weight_decay,
            },
        },
        "zero_optimization": {
            "stage": zero.zero_stage,
            "offload_optimizer": {"device": zero.offload_optimizer},
            "offload_param": {"device": zero.offload_param},
        },
    }


def _further(file: Path, decided: dict[str, Any]) -> dict[str, Any]:
    """What the user's file says beyond our config."""
    try:
        given = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"deepspeed.config {file} cannot be read as JSON: {error}") from error
    if not isinstance(given, dict):
        raise ConfigError(f"deepspeed.config {file} holds {type(given).__name__}, not an object")
    ours, further = dict(_leaves(decided)), dict[str, Any]()
    for path, value in _leaves(given):
        name = ".".join(path)
        if path in ours:
            if value not in ("auto", ours[path]):
                raise ConfigError(
                    f"deepspeed.config {file}: {name} is {value!r}, but the training config makes it {ours[path]!r}: "
                    f'change one of them, or write "auto"'
                )
        elif any(path[: len(key)] == key[: len(path)] for key in ours) or path in REPLACED:
            raise ConfigError(
                f"deepspeed.config {file}: {name} is {value!r}, where the training config has "
                f"deepspeed.{REPLACED.get(path, '*')} and other settings of its own: leave it out"
            )
        elif path[0] in OWN_SETTINGS:
            _merge(further, _nested(path, value))
        else:
            known = sorted(OWN_SETTINGS | {".".join(key) for key in ours})
            raise ConfigError(
                f"deepspeed.config {file}: {name} is not taken from it; allowed: {', '.join(known)}. Learning rate, "
                "schedule, checkpoints and logs are settings of the training config"
            )
    return further


def _leaves(tree: dict[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, (*path, key))
        else:
            yield (*path, key), value


def _nested(path: tuple[str, ...], value: Any) -> dict[str, Any]:
    for key in reversed(path):
        value = {key: value}
    return dict(value)


def _merge(tree: dict[str, Any], other: dict[str, Any]) -> None:
    """Put the values of `other` into `tree`, section by section."""
    for key, value in other.items():
        if isinstance(value, dict) and isinstance(tree.get(key), dict):
            _merge(tree[key], value)
        else:
            tree[key] = value
