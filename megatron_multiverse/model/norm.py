"""RMSNorm for the local layer spec: any device, any float dtype, usable under sequence parallelism."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """Root-mean-square norm with a learned scale, computed in float32 or better.

    megatron-core's own torch norm refuses sequence parallelism; the mark on the weight lets its gradient be
    summed there.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension of x."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        normed = nn.functional.rms_norm(wide, (x.shape[-1],), None, self.eps).to(x.dtype)
        return normed * self.weight.to(x.dtype)
