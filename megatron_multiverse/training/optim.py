"""AdamW, its schedule, clipping, and the guard that keeps non-finite numbers out of the weights."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

import torch
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch import Tensor, nn

from megatron_multiverse.config import OptimConfig
from megatron_multiverse.errors import TrainingError
from megatron_multiverse.training.fused_adamw import build_fused_adamw

logger = logging.getLogger(__name__)


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """AdamW over all parameters, as `config.implementation` says; only matrices decay.

    Its `found_inf` says whether the next step changes anything, see `NonFiniteGuard`.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "wd_mult": 1.0},
        {"params": [p for p in parameters if p.ndim < 2], "wd_mult": 0.0},
    ]
    if config.implementation != "torch":
        return build_fused_adamw(groups, config)
    return torch.optim.AdamW(
        groups,
        lr=config.lr,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_eps,
        weight_decay=config.weight_decay,
        fused=True,  # one kernel, and it can skip the step on the device (see NonFiniteGuard)
    )


def build_scheduler(optimizer: torch.optim.Optimizer, config: OptimConfig, train_iters: int) -> OptimizerParamScheduler:
    """megatron-core's schedule over `lr_decay_iters` (or `train_iters`) steps; `step(1)` comes before each update."""
    decay_iters = config.lr_decay_iters or train_iters
    if decay_iters < train_iters and config.min_lr == 0 and config.lr_decay_style != "constant":
        logger.warning(
            "the learning rate is 0 from step %d on, so that the steps up to %d train nothing: optim.lr_decay_iters is "
            "%d and optim.min_lr 0; raise one of them, or lower train_iters",
            decay_iters, train_iters, decay_iters,
        )  # fmt: skip
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=config.lr,
        min_lr=config.min_lr,
        lr_warmup_steps=config.lr_warmup_iters,
        lr_decay_steps=decay_iters,
        lr_decay_style="WSD" if config.lr_decay_style == "wsd" else config.lr_decay_style,
        start_wd=config.weight_decay,
        end_wd=config.weight_decay,
        wd_incr_steps=decay_iters,
        wd_incr_style="constant",
        # A resumed run follows its config; only the step count comes from the checkpoint.
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
        wsd_decay_steps=config.wsd_decay_iters(decay_iters),
        lr_wsd_decay_style="linear",
    )


def warn_of_another_schedule(scheduler: OptimizerParamScheduler, saved: dict[str, Any]) -> None:
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


def clip_gradients(parameters: Iterable[nn.Parameter], clip_grad: float) -> Tensor:
    """Scale the gradients to a global norm of at most `clip_grad` (0: leave them); no host sync.

    Returns:
        The norm before clipping, a scalar on the device.
    """
    kept = [p for p in parameters if p.grad is not None]
    norm = nn.utils.get_total_norm([p.grad for p in kept if p.grad is not None])
    if clip_grad > 0:
        nn.utils.clip_grads_with_norm_(kept, clip_grad, norm)
    return norm


class NonFiniteGuard:
    """Skips, on the device, every update from the first non-finite loss or gradient on.

    The host learns of it at the next log step or checkpoint, so no step waits for the device. Updates are skipped
    until then, so the weights are still those from before the bad step.
    """

    def __init__(self, device: torch.device) -> None:
        self.first_bad_step = torch.zeros((), dtype=torch.int64, device=device)

    def watch(self, optimizer: torch.optim.Optimizer, step: int, loss: Tensor, grad_norm: Tensor) -> None:
        """Let the next step of the optimizer change nothing if a number in this or an earlier step is not finite."""
        bad = ~(torch.isfinite(loss) & torch.isfinite(grad_norm))
        self.first_bad_step += step * (bad & (self.first_bad_step == 0))
        optimizer.grad_scale = None  # type: ignore[attr-defined]
        optimizer.found_inf = (self.first_bad_step > 0).float()  # type: ignore[attr-defined]

    def check(self) -> None:
        """Raise TrainingError if a number was not finite; waits for the device."""
        if bad_step := int(self.first_bad_step):
            raise TrainingError(
                f"loss or gradient norm is not finite at step {bad_step}; no weight was updated from that step on and "
                "nothing was saved since. Look at the data of that step, lower optim.lr or optim.clip_grad, and start "
                "again: the run goes on from its last checkpoint"
            )
