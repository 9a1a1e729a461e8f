"""A step plan on the device: what the forward pass reads."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from megatron_multiverse.inference.step.plan import StepPlan
from megatron_multiverse.kernels.tree_decode import Attention, TreeDecode


@dataclass(frozen=True, eq=False)
class StepTensors:
    """One step's tokens, where their keys and values go, and how they attend."""

    ids: Tensor
    """int64 [n]."""
    positions: Tensor
    """int64 [n]."""
    logit_tokens: Tensor
    """int64 [s + t], the tokens whose logits are asked for: those of the sampled rows, then the scored ones."""
    write_slots: Tensor
    """int64 [m]."""
    write_tokens: Tensor | None
    """int64 [m]; None where slot i receives token i."""
    attention: Attention
    """(query [n, heads, dim], keys and values [pages, page size, kv heads, dim], scale) -> [n, heads, dim]."""

    @classmethod
    def upload(cls, plan: StepPlan, device: torch.device, last_tokens: Tensor) -> StepTensors:
        """Bring a plan to the device; `last_tokens` are those that the previous step drew."""

        def up(array: npt.NDArray[np.generic]) -> Tensor:
            return torch.from_numpy(array).to(device)

        in_order = device.type == "cpu" and np.array_equal(plan.write_tokens, np.arange(len(plan.ids)))
        return cls(
            ids=known_ids(up(plan.ids), up(plan.sources), last_tokens) if (plan.sources >= 0).any() else up(plan.ids),
            positions=up(plan.positions),
            logit_tokens=up(np.concatenate((plan.borders[1:][plan.sample] - 1, plan.scored))),
            write_slots=up(plan.write_slots),
            write_tokens=None if in_order else up(plan.write_tokens),
            attention=TreeDecode(plan.pages, plan.lengths, plan.borders),
        )


def known_ids(ids: Tensor, sources: Tensor, last_tokens: Tensor) -> Tensor:
    """`StepPlan.ids` with the tokens filled in that the previous step drew, see `StepPlan.sources`."""
    return torch.where(sources < 0, ids, last_tokens[sources.clamp(min=0)])
