"""The names of the number formats, the same in every tool: Megatron's bf16, torch's names for the others."""

from __future__ import annotations

import torch

DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
