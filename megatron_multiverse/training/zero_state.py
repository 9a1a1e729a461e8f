"""Weights and AdamW's moments of a model whose state DeepSpeed's ZeRO has cut up, as whole parameters.

Checkpoints are those of the other engines, so they go on in any engine, stage, number of ranks and layout, and every
tool reads them. DeepSpeed's own files fit the number of ranks that wrote them. At any time one parameter is whole.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.optimizer import make_sharded_optimizer_tensor
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories
from torch import Tensor, distributed, nn
from torch.nn import functional

from megatron_multiverse.checkpoints.formats.torch_dist import TorchDistReader
from megatron_multiverse.checkpoints.names.registry import find_family
from megatron_multiverse.checkpoints.names.rules import slices
from megatron_multiverse.checkpoints.names.table import Entry, entries
from megatron_multiverse.checkpoints.protocols import pad_rows
from megatron_multiverse.config import ModelConfig, pad_vocab_size
from megatron_multiverse.training.host_memory import HostMemory
from megatron_multiverse.training.sharded_state import MOMENTS, with_data
from megatron_multiverse.weight_names import plain_name


@contextlib.contextmanager
def whole_shapes(model: nn.Module) -> Iterator[None]:
    """Inside the block parameters that ZeRO 3 has cut have the shapes of whole ones; their values must not be used."""
    cut = [(parameter, parameter.data) for parameter in model.parameters() if hasattr(parameter, "ds_shape")]
    for parameter, data in cut:
        parameter.data = data.new_zeros(()).expand(parameter.ds_shape)
    try:
        yield
    finally:
        for parameter, data in cut:
            parameter.data = data


def write_partitioned(parameter: nn.Parameter, value: Tensor) -> None:
    """Put the same value into a parameter on all ranks that share it, whether or not ZeRO 3 has cut it."""
    from deepspeed.runtime.zero import GatheredParameters

    with GatheredParameters([parameter], modifier_rank=0), torch.no_grad():
        parameter.copy_(value)


def whole_weight(parameter: nn.Parameter) -> Tensor:
    """The value of a parameter in the model's own dtype, on all ranks that share it; they call it together."""
    from deepspeed.runtime.zero import GatheredParameters

    with GatheredParameters([parameter]):
        return parameter.detach().clone()


class ZeroState:
    """The float32 weights and the moments, of which each rank has a part.

    Args:
        zero: DeepSpeed's engine.
        model: what it trains.
        optimizer: torch's AdamW over ZeRO's flat parameters.
        group: the ranks that share the state.
    """

    def __init__(self, zero: Any, model: nn.Module, optimizer: torch.optim.AdamW, group: Any) -> None:
        self.zero, self.model, self.optimizer = zero, model, optimizer
        self.group, self.rank, self.size = group, group.rank(), group.size()
        self._make_moments()

    def _make_moments(self) -> None:
        """AdamW would make them at its first step; they are read and written before."""
        sharing = self.zero.optimizer
        names = ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat_partition")
        for flat in next(getattr(sharing, name) for name in names if hasattr(sharing, name)):
            state = self.optimizer.state[flat]
            state["step"] = torch.zeros((), dtype=torch.float32, device=flat.device)
            for name in MOMENTS:
                state[name] = torch.zeros_like(flat.data)
        if hasattr(sharing, "_lazy_init_hp_params_optimizer_state"):  # stages 1 and 2: where each parameter's part lies
            sharing._lazy_init_hp_params_optimizer_state()

    def sharded(self, model_state: dict[str, Any], host: HostMemory) -> tuple[dict[str, Any], dict[str, Any]]:
        """Weights and moments as sharded tensors, named as those of one process: float32, whole parameters.

        The ranks take turns in keeping a parameter, on the host, and write what they have kept; the others have
        stand-ins that take no memory.

        Args:
            model_state: of the model, see `sharded_state.model_state`; its weights are replaced by float32 ones.
            host: where the tensors of this rank are copied to; they are complete after its `wait`.

        Returns:
            The state of the model, and of the optimizer.
        """
        tensors, _ = extract_sharded_tensors_and_factories(model_state)
        by_parameter = {id(sharded.data): sharded for sharded in nested_values(tensors)}
        weights: dict[str, Any] = {}
        moments: dict[str, Any] = {}
        for number, parameter in enumerate(self.model.parameters()):
            sharded = by_parameter[id(parameter)]
            turn = (sharded.replica_id[-1] - number) % self.size  # the rank with 0 writes
            sharded = replace(sharded, replica_id=(*sharded.replica_id[:-1], turn))
            weights[str(number)] = with_data(sharded, self._kept(number, self._weight(parameter), host))
            for name in MOMENTS:
                value = self._kept(number, self._moment(parameter, name), host)
                key = f"optimizer.state.{name}"
                moments[f"{number}.{name}"] = make_sharded_optimizer_tensor(sharded, value, key)
        return weights, moments

    def _kept(self, number: int, value: Tensor, host: HostMemory) -> Tensor:
        is_mine = number % self.size == self.rank
        return host.copy(value) if is_mine else torch.zeros(()).expand(value.shape)

    def _weight(self, parameter: nn.Parameter) -> Tensor:
        from deepspeed.utils import safe_get_full_fp32_param

        value: Tensor = safe_get_full_fp32_param(parameter)
        return value.view(_shape(parameter))

    def _moment(self, parameter: nn.Parameter, name: str) -> Tensor:
        from deepspeed.utils import safe_get_full_optimizer_state

        value: Tensor = safe_get_full_optimizer_state(parameter, name)
        return value.view(_shape(parameter))

    def load(self, folder: Path, config: ModelConfig, steps: float) -> None:
        """Take over the weights and moments of a checkpoint, whatever wrote it.

        The ranks take turns in reading a tensor, and send it to those that share it.

        Args:
            folder: a `torch_dist` checkpoint of the trainer.
            config: shape of the model, vocabulary without padding.
            steps: updates done.

        Raises:
            CheckpointError: it is damaged, or lacks a tensor.
        """
        reader = TorchDistReader(folder)
        parameters = {plain_name(name): parameter for name, parameter in self.model.named_parameters()}
        for number, entry in enumerate(entries(find_family(None, config), config)):
            parameter = parameters[entry.mcore]
            weight = self._read(reader, entry, "", number, parameter, config)
            write_partitioned(parameter, weight)
            self._set(parameter, None, weight)
            for name in MOMENTS:
                value = self._read(reader, entry, f"optimizer.state.{name}.", number, parameter, config)
                self._set(parameter, name, value)
        for values in self.optimizer.state.values():
            values["step"].fill_(steps)

    def _set(self, parameter: nn.Parameter, moment: str | None, value: Tensor) -> None:
        """Give this rank its part of a moment, or of the float32 weight."""
        from deepspeed import utils

        part: Tensor | None = getattr(parameter, "ds_tensor", None)
        local = part is not None
        if part is not None:  # DeepSpeed's own setter of whole values fails where the ranks do not divide the elements
            length = part.numel()
            value = functional.pad(value.flatten(), (0, length * self.size - value.numel()))
            value = value[length * self.rank : length * (self.rank + 1)]
        if moment is None:
            (utils.safe_set_local_fp32_param if local else utils.safe_set_full_fp32_param)(parameter, value)
        else:
            setter = utils.safe_set_local_optimizer_state if local else utils.safe_set_full_optimizer_state
            setter(parameter, value, moment)

    def _read(
        self,
        reader: TorchDistReader,
        entry: Entry,
        prefix: str,
        number: int,
        parameter: nn.Parameter,
        config: ModelConfig,
    ) -> Tensor:
        """This tensor parallel rank's part of one tensor of the checkpoint, float32, on all ranks that share it."""
        value = torch.empty(_shape(parameter), dtype=torch.float32, device=self.zero.device)
        owner = number % self.size
        if owner == self.rank:
            whole, tp = reader.read(entry, prefix), parallel_state.get_tensor_model_parallel_world_size()
            if entry.rule == "vocab":  # the run that wrote it may have padded it otherwise
                whole = pad_rows(entry, whole[: config.vocab_size], pad_vocab_size(config.vocab_size, tp))
            value.copy_(slices(entry.rule, whole, tp)[parallel_state.get_tensor_model_parallel_rank()])
        distributed.broadcast(value, group=self.group, group_src=owner)
        return value


def _shape(parameter: nn.Parameter) -> torch.Size:
    """Of the whole parameter."""
    shape: torch.Size = getattr(parameter, "ds_shape", parameter.shape)
    return shape
