"""The one place that chooses the device of a run, and how tensors get there."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_multiverse.errors import ConfigError

DEVICES = ("auto", "cpu", "cuda")


def choose_device(name: str) -> torch.device:
    """The device called "auto" (CUDA if there is a GPU), "cpu" or "cuda".

    Raises:
        ConfigError: any other name, or cuda without a GPU.
    """
    if name not in DEVICES:
        raise ConfigError(f"device is {name!r}, allowed: {', '.join(DEVICES)}")
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device is cuda, but torch sees no GPU: set device to cpu or auto")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def device_name(device: torch.device) -> str:
    """What a report says of the device: the name of the GPU, or CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper()


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy on the device. From pinned memory, since a copy from pageable memory waits for earlier kernels."""
    if device.type == "cuda" and not tensor.is_cuda:
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
