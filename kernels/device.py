"""What launchers ask of a GPU."""

from __future__ import annotations

import functools

import torch


@functools.cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; those of an H100 for tensors on a CPU, as when kernels are compiled without a GPU."""
    return 132 if device.type == "cpu" else torch.cuda.get_device_properties(device).multi_processor_count
