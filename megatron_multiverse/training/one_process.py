"""The engine of a run in one process, on one device: megatron-core's model, torch's AdamW, gradients added up in place.

Nothing in a step waits for the device: the loss, the gradient norm and whether they are finite stay there until
`check` or the log asks.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from megatron_multiverse.config import LayerConfig, ModelConfig, TrainConfig
from megatron_multiverse.model.weights import save_model
from megatron_multiverse.training import sharded_state
from megatron_multiverse.training.engine import StepResult
from megatron_multiverse.training.flops import peak_tflops
from megatron_multiverse.training.forward import (
    LossFunction,
    arithmetic,
    forward_backward,
    masked_loss_sum,
    validate,
)
from megatron_multiverse.training.host_memory import HostMemory
from megatron_multiverse.training.metrics import MetricsWriter
from megatron_multiverse.training.microbatches import Documents, Microbatch
from megatron_multiverse.training.optim import (
    NonFiniteGuard,
    build_optimizer,
    build_scheduler,
    clip_gradients,
    warn_of_another_schedule,
)
from megatron_multiverse.training.phases import PhaseClock
from megatron_multiverse.training.placement import Placers
from megatron_multiverse.training.validation import Validation


class OneProcessEngine:
    """See `TrainEngine`, whose first member this is.

    Args:
        config: the run.
        model: megatron-core's model, on its device.
        model_config: its shape.
        layers: how its layers are computed, without any "auto".
        loader: where the microbatches of `step` come from.
        valid_loader: where those of `validate` come from, if there are any.
        loss: what `step` differentiates.
    """

    def __init__(
        self,
        config: TrainConfig,
        model: nn.Module,
        model_config: ModelConfig,
        layers: LayerConfig,
        loader: Documents,
        valid_loader: Documents | None = None,
        loss: LossFunction = masked_loss_sum,
    ) -> None:
        self.config, self.model, self.model_config, self.layers = config, model, model_config, layers
        self.device = next(model.parameters()).device
        self.peak_tflops = peak_tflops(self.device, config.dtype, config.log.peak_tflops)
        self.optimizer = build_optimizer(model, config.optim)
        self.scheduler = build_scheduler(self.optimizer, config.optim, config.train_iters)
        self.clock = PhaseClock(self.device)
        self._loss = loss
        self._guard = NonFiniteGuard(self.device)
        malformed = config.data.malformed
        self._placers = Placers(loader, valid_loader, self.device, layers.attention_backend, malformed)

    @property
    def learning_rate(self) -> float:
        """See `TrainEngine.learning_rate`."""
        return float(self.optimizer.param_groups[0]["lr"])

    def running(self) -> contextlib.AbstractContextManager[None]:
        """See `TrainEngine.running`."""
        return arithmetic(self.config)

    def step(self, microbatches: Sequence[Microbatch]) -> StepResult:
        """See `TrainEngine.step`."""
        self.scheduler.step(1)
        loss = self.clock.around_forward(self._loss)
        sums = forward_backward(self.model, microbatches, self._placers.train, self.config.dtype, loss)
        self.clock.begin("optimizer")
        grad_norm = clip_gradients(self.model.parameters(), self.config.optim.clip_grad)
        self._guard.watch(self.optimizer, self.scheduler.num_steps, sums.loss, grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.clock.end()
        return StepResult(**vars(sums), grad_norm=grad_norm)

    def validate(self, microbatches: Iterable[Microbatch]) -> Validation:
        """See `TrainEngine.validate`."""
        return validate(self.model, microbatches, self._placers.valid, self.config.dtype)

    def check(self, metrics: MetricsWriter) -> None:
        """See `TrainEngine.check`."""
        self._guard.check()
        self._placers.report(self.scheduler.num_steps, metrics)

    def state(self, *, is_loading: bool = False, host: HostMemory | None = None) -> dict[str, Any]:
        """See `TrainEngine.state`. Puts no tensor together."""
        model = sharded_state.model_state(self.model)
        optimizer = sharded_state.adamw_state(self.optimizer, model)
        if is_loading:
            return {"model": sharded_state.without_extra_states(model), "optimizer": optimizer}
        return {
            "model": model,
            "optimizer": optimizer,
            "other_spec": sharded_state.missing_extra_states(self.model, model),
            "optimizer_step": sharded_state.adamw_steps(self.optimizer),
            "opt_param_scheduler": self.scheduler.state_dict(),
        }

    def load(self, state: dict[str, Any], folder: Path) -> None:
        """See `TrainEngine.load`."""
        sharded_state.load_weights(self.model, state["model"], folder)
        sharded_state.load_adamw(self.optimizer, state["optimizer"], state["optimizer_step"])
        warn_of_another_schedule(self.scheduler, state["opt_param_scheduler"])
        self.scheduler.load_state_dict(state["opt_param_scheduler"])

    def save_model(self, folder: Path) -> None:
        """See `TrainEngine.save_model`."""
        save_model(self.model, self.model_config, folder)
