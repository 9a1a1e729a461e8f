"""Puts the weights of one model into another."""

from __future__ import annotations

import torch
from torch import nn

from megatron_multiverse.model.weights import weight_state


@torch.no_grad()
def copy_weights(model: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    """Copy tensors by plain name into the model; they must be exactly its weights."""
    wanted = weight_state(model)
    assert {n: t.shape for n, t in wanted.items()} == {n: t.shape for n, t in tensors.items()}
    for name, tensor in wanted.items():
        tensor.copy_(tensors[name])
