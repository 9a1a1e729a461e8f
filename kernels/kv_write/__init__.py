"""The rotated query and the new entries of the cache, from the mixed projection or in one launch with it."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_multiverse.kernels.fused_linear import few_rows, linear

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


def linear_write_kv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
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
    """`fused_linear.linear` to the mixed projection, then `write_kv`; for up to 8 rows in half precision, without norms
    and with weights that are not in FP8, in one launch.

    Args:
        x: ``[n, hidden]``; weight, bias and scale as `linear` takes them.
        table: see `write_kv_reference`, as is all that follows.

    Returns:
        The rotated query ``[n, heads, head dim]``.
    """
    if query_norm is None and tokens is not None and scale is None and few_rows(x, weight, None):
        from .triton_product import fits, linear_write_kv_triton

        if fits(len(x), table.shape[-1], len(slots)):
            return linear_write_kv_triton(x, weight, table, keys, values, slots, tokens, bias=bias)
    mixed = linear(x, weight, bias, scale)
    mixed = mixed.view(len(mixed), keys.shape[-2], -1)
    return write_kv(mixed, table, keys, values, slots, tokens, query_norm=query_norm, key_norm=key_norm, eps=eps)


__all__ = ["linear_write_kv", "write_kv", "write_kv_reference"]
