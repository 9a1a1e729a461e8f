"""The one place that chooses the device of a run."""

from __future__ import annotations

import torch

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
