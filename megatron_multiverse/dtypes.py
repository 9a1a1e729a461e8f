"""The names of the number formats, the same in every tool: Megatron's bf16, torch's names for the others."""

from __future__ import annotations

import torch

DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}


def engine_dtype(name: str, device: torch.device) -> torch.dtype:
    """The format of an engine's weights and cache. "auto" is bf16 on a GPU, as models are published, and float32 on a
    CPU, where bf16 is the slower one."""
    if name == "auto":
        name = "bf16" if device.type == "cuda" else "float32"
    return DTYPES[name]
