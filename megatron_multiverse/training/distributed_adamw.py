"""AdamW spread over the data parallel ranks: megatron-core's distributed optimizer around a fused AdamW.

The update is that of one process: the same groups, the same kernel, the same guard. megatron-core adds who owns which
range of the parameters, the reduction of gradients and the gathering of updated weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.optimizer import make_sharded_optimizer_tensor
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer_config import OptimizerConfig
from torch import Tensor, distributed, nn

from megatron_multiverse.config import OptimConfig
from megatron_multiverse.training.host_memory import HostMemory
from megatron_multiverse.training.optim import build_optimizer
from megatron_multiverse.training.sharded_state import MOMENTS, set_adamw_steps, with_data

Parameter = nn.Parameter
WEIGHT = "param"
"""What megatron-core calls the float32 weights beside the moments."""


class DistributedAdamW:
    """Weights in float32 and moments of each parameter lie on one of the data (and context) parallel ranks.

    Args:
        chunks: megatron-core's DistributedDataParallel around each chunk of the model on this rank, built with
            `use_distributed_optimizer`.
        config: the optimizer's settings.
        dtype: of the model's weights: float32 or bfloat16.
    """

    def __init__(self, chunks: Sequence[Any], config: OptimConfig, dtype: torch.dtype) -> None:
        self.config = config
        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        self.mcore = DistributedOptimizer(
            build_optimizer(nn.ModuleList(chunks), config),
            OptimizerConfig(bf16=dtype == torch.bfloat16, use_distributed_optimizer=True, lr=config.lr),
            grad_scaler=None,
            init_state_fn=None,
            model_chunks=list(chunks),
            per_model_buffers={number: chunk.buffers for number, chunk in enumerate(chunks)},
            data_parallel_group=group,
            data_parallel_group_gloo=None,
            data_parallel_group_idx=parallel_state.get_model_parallel_group().rank(),
            distributed_optimizer_instance_id=0,
        )
        self.mcore.tp_group = parallel_state.get_tensor_model_parallel_group()

    @property
    def adamw(self) -> torch.optim.Optimizer:
        """The AdamW over this rank's ranges."""
        optimizer: torch.optim.Optimizer = self.mcore.optimizer
        return optimizer

    def clip_gradients(self) -> Tensor:
        """Take over the reduced gradients and scale them to a global norm of at most `clip_grad`; no host sync.

        Returns:
            The norm over all ranks before clipping, a scalar on the device.
        """
        self.mcore.prepare_grads()
        # megatron-core 0.19 has the second name alone.
        names = ("get_main_grads_for_grad_norm", "get_grads_for_grad_norm")
        grads = next(getattr(self.mcore, name) for name in names if hasattr(self.mcore, name))()
        norms = [grad.norm() for grad in grads] or [torch.zeros((), device=self._device)]
        square = torch.stack(norms).double().square().sum()
        distributed.all_reduce(square)
        norm = square.sqrt().float()
        if self.config.clip_grad > 0:
            owned = [p for p in self.mcore.get_parameters() if p.grad is not None]
            nn.utils.clip_grads_with_norm_(owned, self.config.clip_grad, norm)
        return norm

    def step(self) -> None:
        """Update the ranges of this rank and gather the weights."""
        self.mcore.step_with_ready_grads()
        self.mcore.zero_grad(set_to_none=True)

    @property
    def _device(self) -> torch.device:
        device: torch.device = self.mcore.buffers[0].grad_data.device
        return device

    def sharded_state(
        self, model_state: dict[str, Any], host: HostMemory | None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Weights and moments as sharded tensors, named as those of one process: float32, whole parameters.

        Each range is gathered from its owner to the first data parallel rank, which writes. Where there is one such
        rank, these are the optimizer's own tensors.

        Args:
            model_state: of the model, see `sharded_state.model_state`; its weights are replaced by float32 ones.
            host: what is gathered is copied there, complete after its `wait`; None: give tensors to be filled.

        Returns:
            The state of the model, and of the optimizer.
        """
        tensors, _ = extract_sharded_tensors_and_factories(model_state)
        by_parameter = {id(sharded.data): sharded for sharded in nested_values(tensors)}
        weights: dict[str, Any] = {}
        moments: dict[str, Any] = {}
        for name in (WEIGHT, *MOMENTS):
            values = self._to_fill() if host is None else self._gathered(name, host)
            for number, (parameter, value) in enumerate(values.items()):
                sharded = by_parameter[id(parameter)]
                if name == WEIGHT:
                    weights[str(number)] = with_data(sharded, value)
                else:
                    moments[f"{number}.{name}"] = make_sharded_optimizer_tensor(
                        sharded, value, f"optimizer.state.{name}"
                    )
        return weights, moments

    def load(self, weights: Mapping[str, Tensor], moments: Mapping[str, Tensor], steps: float) -> None:
        """Take over filled tensors of `sharded_state` without `host`.

        Args:
            weights: of whole parameters.
            moments: likewise.
            steps: updates done.
        """
        self._make_moments()
        for number, parameter in enumerate(self._parameters()):
            whole = {WEIGHT: weights[str(number)]} | {name: moments[f"{number}.{name}"] for name in MOMENTS}
            parameter.data.copy_(whole[WEIGHT])
            if parameter in self.mcore.model_param_gbuf_map:  # this rank owns a range of it
                owned = self.mcore._get_model_param_range_map(parameter)["param"]
                mine = self.mcore._get_main_param_and_optimizer_states(parameter)
                for name, value in whole.items():
                    mine[name].data.copy_(value.flatten()[owned.start : owned.end])
        set_adamw_steps(self.adamw, steps)

    def _parameters(self) -> list[Parameter]:
        """In the order in which they lie in the gradient buffers, the same on all data parallel ranks."""
        return [parameter for buffer in self.mcore.buffers for parameter in buffer.param_index_map]

    def _to_fill(self) -> dict[Parameter, Tensor]:
        return {parameter: torch.zeros(parameter.shape) for parameter in self._parameters()}

    def _make_moments(self) -> None:
        """AdamW makes them at its first step."""
        for group in self.adamw.param_groups:
            for owned in group["params"]:
                state = self.adamw.state[owned]
                if isinstance(self.adamw, torch.optim.AdamW):
                    state.setdefault("step", torch.zeros((), dtype=torch.float32, device=owned.device))
                for name in MOMENTS:
                    if name not in state:
                        state[name] = torch.zeros_like(owned.data)

    @torch.no_grad()
    def _gathered(self, name: str, host: HostMemory) -> dict[Parameter, Tensor]:
        """One kind of float32 tensor of every parameter of this rank's model.

        On the first data parallel rank whole tensors on the host; on the others stand-ins that take no memory. A single
        rank has them whole already.
        """
        self._make_moments()
        if self.mcore.data_parallel_group.size() == 1:
            owned = {p: self.mcore._get_main_param_and_optimizer_states(p)[name] for p in self._parameters()}
            return {parameter: value.view(parameter.shape) for parameter, value in owned.items()}
        values: dict[Parameter, Tensor] = {}
        for buffer, ranges in zip(self.mcore.buffers, self.mcore.gbuf_ranges, strict=True):
            (of_buckets,) = ranges.values()
            for bucket, of_bucket in zip(buffer.buckets, of_buckets, strict=True):
                parts = self._gathered_bucket(bucket.grad_data.numel(), of_bucket["param_map"], name)
                for parameter in bucket.params_list:
                    if parts is None:
                        values[parameter] = torch.zeros(()).expand(parameter.shape)
                        continue
                    start, end, _ = buffer.param_index_map[parameter]
                    value = _on_host(parts, start - bucket.offset, end - bucket.offset, host)
                    values[parameter] = value.view(parameter.shape)
        return {parameter: values[parameter] for parameter in self._parameters()}

    def _gathered_bucket(self, size: int, owned: Mapping[Parameter, Any], name: str) -> list[Tensor] | None:
        """A flat bucket of `size` elements on the first data parallel rank, in the equal parts of its ranks, on their
        device; None on the others."""
        group = self.mcore.data_parallel_group
        mine = torch.zeros(size // group.size(), dtype=torch.float32, device=self._device)
        for parameter, ranges in owned.items():
            place = ranges["gbuf_local"]
            mine[place.start : place.end] = self.mcore._get_main_param_and_optimizer_states(parameter)[name]
        parts = [torch.empty_like(mine) for _ in range(group.size())] if group.rank() == 0 else None
        distributed.gather(mine, parts, group=group, group_dst=0)
        return parts


def _on_host(parts: Sequence[Tensor], start: int, end: int, host: HostMemory) -> Tensor:
    """The elements from start to end of equal parts that lie one after the other, copied once."""
    size = parts[0].numel()
    found = host.empty((end - start,), torch.float32, parts[0].device)
    for number, part in enumerate(parts):
        first, last = max(start, number * size), min(end, (number + 1) * size)
        if first < last:
            host.fill(found[first - start : last - start], part[first - number * size : last - number * size])
    return found
