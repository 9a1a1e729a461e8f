"""AdamW by the fused kernels of TransformerEngine or of NVIDIA apex, behind the face of torch's.

Both packages have the same class, `FusedAdam`, whose "capturable" form can skip an update on the device. It differs
from torch's fused AdamW in three ways. Two of them `_Adapted` evens out: the learning rate must be a tensor on the
device, and what skips an update is asked of a gradient scaler. The number of updates stands in the groups, not beside
each parameter, which `sharded_state` knows.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
from typing import Any

import torch
from torch import Tensor

from megatron_multiverse.config import OptimConfig, TrainConfig
from megatron_multiverse.errors import ConfigError
from megatron_multiverse.model.layer_specs import transformer_engine_problem

MODULES = {"transformer_engine": "transformer_engine.pytorch.optimizers", "apex": "apex.optimizers"}
"""Implementation -> where its FusedAdam is."""


def check_optimizer(config: TrainConfig, device: torch.device) -> None:
    """Raise ConfigError if the implementation that `config.optim` asks for cannot run on `device`."""
    implementation, problem = config.optim.implementation, None
    if implementation == "transformer_engine":
        problem = transformer_engine_problem(device)
    elif implementation == "apex":
        from megatron.core.optimizer import distrib_optimizer

        problem = apex_problem() if device.type == "cuda" else f"apex needs a CUDA device, got {device.type}"
        if problem is None and config.runs_on == "megatron" and distrib_optimizer.USING_TE_OPTIMIZER:
            problem = (
                "TransformerEngine is installed, and then megatron-core's distributed optimizer takes no other fused "
                "Adam than TransformerEngine's"
            )
    if problem is not None:
        raise ConfigError(
            f"optim.implementation {implementation!r} cannot run here: {problem}. Mend that, or leave "
            "optim.implementation at torch, whose AdamW is one fused kernel, too"
        )


def apex_problem() -> str | None:
    """Why NVIDIA apex's optimizers cannot be used, or None. Python's package index has another package of that name."""
    source = "build it from github.com/NVIDIA/apex with its C++ and CUDA extensions"
    if importlib.util.find_spec("apex") is None:
        return f"NVIDIA apex is not installed; {source} (`pip install apex` gets an unrelated package)"
    try:
        found = importlib.util.find_spec("apex.optimizers")
    except ImportError:  # the other package needs packages of its own
        found = None
    if found is None:
        return (
            f"the installed package apex{_version('apex')} is not NVIDIA's, but the one of the same name in Python's "
            f"package index: pip uninstall apex, then {source}"
        )
    if importlib.util.find_spec("amp_C") is None:
        return f"NVIDIA apex is installed without its CUDA extensions; {source}"
    return None


def _version(package: str) -> str:
    try:
        return f" {importlib.metadata.version(package)}"
    except importlib.metadata.PackageNotFoundError:
        return ""


def build_fused_adamw(groups: list[dict[str, Any]], config: OptimConfig) -> torch.optim.Optimizer:
    """The FusedAdam of `config.implementation`, which is there (`check_optimizer`), as AdamW over these groups."""
    base = importlib.import_module(MODULES[config.implementation]).FusedAdam
    made: torch.optim.Optimizer = type("FusedAdamW", (_Adapted, base), {})(
        groups,
        lr=config.lr,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_eps,
        weight_decay=config.weight_decay,
        adam_w_mode=True,
        capturable=True,
    )
    return made


class _Adapted(torch.optim.Optimizer):
    """Stands before a FusedAdam in the order of classes."""

    found_inf: Tensor
    """1 where the next step is to change nothing, else 0: a scalar on the device, set before each step."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update; what the groups hold as learning rate stays a number."""
        groups, rates = self.param_groups, [group["lr"] for group in self.param_groups]
        # A rank may own nothing of a group, for which apex asks for its device.
        self.param_groups = [group for group in groups if group["params"]]
        for group in self.param_groups:
            # Filled on the device: a copy from the host would wait for all that it has still to do.
            group["lr"] = torch.full((), float(group["lr"]), device=group["params"][0].device)
        try:
            super().step(grad_scaler=_Skip(self.found_inf))  # type: ignore[call-overload]
        finally:
            self.param_groups = groups
            for group, rate in zip(groups, rates, strict=True):
                group["lr"] = rate

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As torch's; apex's takes no argument."""
        torch.optim.Optimizer.zero_grad(self, set_to_none)


class _Skip:
    """What a FusedAdam asks of a gradient scaler: whether to skip the update, and by what the loss was multiplied."""

    def __init__(self, found_inf: Tensor) -> None:
        self._found_inf = found_inf

    def _check_inf_per_device(self, optimizer: torch.optim.Optimizer) -> dict[torch.device, Tensor]:
        return {self._found_inf.device: self._found_inf.reshape(1)}

    def _get_scale_async(self) -> Tensor:
        return torch.ones(1, device=self._found_inf.device)
