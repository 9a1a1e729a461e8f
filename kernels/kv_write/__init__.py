"""From the mixed projection to a rotated query and new entries of the cache: one launch on a GPU."""

from __future__ import annotations

import torch
from torch import Tensor

from .reference import write_kv_reference


def write_kv(
    mixed: Tensor,
    table: Tensor,
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
    tokens: Tensor | None,
    *,
    query_norm: Tensor | None = None,
    key_norm: Tensor | None = None,
    eps: float = 0.0,
) -> Tensor:
    """See `write_kv_reference`."""
    if mixed.is_cuda and mixed.dtype != torch.float64 and tokens is not None:
        from .triton_write import write_kv_triton

        return write_kv_triton(
            mixed, table, keys, values, slots, tokens, query_norm=query_norm, key_norm=key_norm, eps=eps
        )
    return write_kv_reference(
        mixed, table, keys, values, slots, tokens, query_norm=query_norm, key_norm=key_norm, eps=eps
    )


__all__ = ["write_kv", "write_kv_reference"]
