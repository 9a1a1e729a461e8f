"""The residual stream after a product whose sum is cut over tensor parallel ranks, and its norm: the plain version."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def sum_norm_reference(
    parts: Sequence[Tensor], residual: Tensor, norm_weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Add what all ranks hold to the residual stream, in the order of ranks, and take its RMSNorm.

    Args:
        parts: [n, width] of each rank.
        residual: [n, width], the same on all ranks.
        norm_weight: [width].
        eps: of the norm.

    Returns:
        The new residual stream and its norm, [n, width] each, in the dtype of `residual`.
    """
    wide = torch.promote_types(residual.dtype, torch.float32)
    total = residual.to(wide)
    for part in parts:
        total = total + part.to(wide)
    normed = F.rms_norm(total, (total.shape[-1],), norm_weight.to(wide), eps)
    return total.to(residual.dtype), normed.to(residual.dtype)
