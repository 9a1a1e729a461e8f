"""Rotary position embedding by explicit position ids.

`rotate` and `split_and_rotate` choose: one Triton kernel on a GPU, plain torch on a CPU and for float64. Importing this
needs torch alone; Triton is imported when a kernel runs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .reference import (
    inverse_frequencies,
    llama3_frequencies,
    rope_angles,
    rope_reference,
    rope_table,
    rotate_by_table,
    rotate_qkv_by_table,
)


def rotate(query: Tensor, key: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate query and key by the angles of their tokens.

    Args:
        query: [s, b, h, dim].
        key: [s, b, g, dim], in the dtype of query.
        table: [b, s, dim] by `rope_table`; it takes no gradient.

    Returns:
        The rotated query and key, in their shapes and dtype.

    Raises:
        ValueError: the kernel runs, and shapes or dtypes do not fit.
    """
    if _has_kernel(query):
        from .triton_rotate import rotate_triton

        return rotate_triton(query, key, table)
    return rotate_by_table(query, table), rotate_by_table(key, table)


def split_and_rotate(mixed: Tensor, table: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Split megatron-core's mixed projection into query, key and value, and rotate query and key.

    Args:
        mixed: [s, b, g, (h / g + 2) * dim]; per group its queries, its key, its value.
        table: [b, s, dim] by `rope_table`; it takes no gradient.

    Returns:
        query [s, b, h, dim] and key [s, b, g, dim], both rotated, and value [s, b, g, dim]. The value is a copy if the
        kernel runs, otherwise a view of mixed.

    Raises:
        ValueError: shapes or dtypes do not fit.
    """
    if _has_kernel(mixed):
        from .triton_qkv import split_and_rotate_triton

        return split_and_rotate_triton(mixed, table)
    return rotate_qkv_by_table(mixed, table)


def _has_kernel(x: Tensor) -> bool:
    """The kernels run on GPUs and compute in float32, which would not do for a float64 model."""
    return x.is_cuda and x.dtype != torch.float64


__all__ = [
    "inverse_frequencies",
    "llama3_frequencies",
    "rope_angles",
    "rope_reference",
    "rope_table",
    "rotate",
    "rotate_by_table",
    "rotate_qkv_by_table",
    "split_and_rotate",
]
