"""Model and AdamW as megatron-core's `dist_checkpointing` stores them: tensors placed in the whole model.

Tensors carry megatron-core's own names (`decoder.layers...`, `optimizer.state.exp_avg...`), so Megatron finds them.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from megatron.core.dist_checkpointing.optimizer import (
    get_param_id_to_sharded_param_map,
    make_sharded_optimizer_tensor,
)
from megatron.core.transformer.utils import make_sharded_object_for_checkpoint
from torch import Tensor, nn

from megatron_multiverse.errors import CheckpointError
from megatron_multiverse.weight_names import (
    FINAL_EXTRA_STATE,
    extra_state_modules,
    is_extra_state,
    layer_extra_state,
)

MOMENTS = ("exp_avg", "exp_avg_sq")
"""AdamW's tensors of one parameter, in torch's names; its third value, the step count, is the same for all."""


def model_state(model: Any) -> dict[str, Any]:
    """The weights and extra states of this rank's part of a megatron-core model."""
    state: dict[str, Any] = model.sharded_state_dict(metadata={})
    return state


def without_extra_states(state: dict[str, Any]) -> dict[str, Any]:
    """The weights alone. The layer specs differ in the modules that have an extra state; weights go into either."""
    return {name: value for name, value in state.items() if not is_extra_state(name)}


def missing_extra_states(model: Any, present: dict[str, Any]) -> dict[str, Any]:
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


def load_weights(model: nn.Module, weights: dict[str, Any], folder: Path) -> None:
    """Put loaded weights into a model. Raises CheckpointError, which names `folder`, if they do not fit it."""
    missing, unexpected = model.load_state_dict(weights, strict=False)
    misfits = [name for name in missing if not is_extra_state(name)] + unexpected
    if misfits:
        raise CheckpointError(
            f"{folder}: weights do not fit the model, e.g. {misfits[0]}: resume with the model settings of the run"
        )


def adamw_state(optimizer: torch.optim.Optimizer, model_state: dict[str, Any]) -> dict[str, Any]:
    """AdamW's tensors as sharded tensors named after their parameters, so that TP and PP may change.

    Args:
        optimizer: stays as it is; before its first step its tensors are zeros.
        model_state: of the model that it updates, see `model_state`.
    """
    parameters = _parameters(optimizer)
    by_id = get_param_id_to_sharded_param_map(model_state, parameters)
    sharded: dict[str, Any] = {}
    for number, parameter in enumerate(parameters):
        values = optimizer.state.get(parameter, {})
        for name in MOMENTS:
            # Zeros stay out of the optimizer, which counts its steps only where it makes its tensors itself.
            value = values[name] if name in values else torch.zeros_like(parameter)
            sharded[f"{number}.{name}"] = make_sharded_optimizer_tensor(by_id[number], value, f"optimizer.state.{name}")
    return sharded


def adamw_steps(optimizer: torch.optim.Optimizer) -> float:
    """Updates done, the same for all parameters; 0 before the first one. Waits for the device."""
    places = optimizer.state.values() if isinstance(optimizer, torch.optim.AdamW) else optimizer.param_groups
    steps = [values["step"] for values in places if "step" in values]
    return float(steps[0]) if steps else 0.0


def set_adamw_steps(optimizer: torch.optim.Optimizer, steps: float) -> None:
    """Put back the number of updates, where torch has it, or the other implementations."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if isinstance(optimizer, torch.optim.AdamW):
                step = torch.tensor(steps, dtype=torch.float32, device=parameter.device)
                optimizer.state[parameter]["step"] = step
            else:
                group["step"] = torch.tensor([int(steps)], dtype=torch.int32, device=parameter.device)


def load_adamw(optimizer: torch.optim.Optimizer, tensors: dict[str, Any], steps: float) -> None:
    """Put back the tensors of `adamw_state`, filled, and the number of updates."""
    for number, parameter in enumerate(_parameters(optimizer)):
        values = optimizer.state[parameter]
        for name in MOMENTS:
            values[name] = tensors[f"{number}.{name}"].to(parameter.device)
    set_adamw_steps(optimizer, steps)


def with_data(sharded: Any, data: Tensor) -> Any:
    """The ShardedTensor, or factory of such, for the same place in the whole model and another tensor."""
    if isinstance(sharded, ShardedTensorFactory):
        return replace(sharded, data=data)
    return replace(sharded, data=data, dtype=data.dtype)


def _parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    """In the order of the groups, which numbers them in a checkpoint."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
