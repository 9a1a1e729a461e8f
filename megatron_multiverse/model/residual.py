"""The residual addition of both layer specs: no dropout, and the stream keeps its own precision.

megatron-core's version casts the residual stream to the dtype of the branch. Under autocast that would round the
stream to bf16 in every layer although its weights are float32.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor


def residual_add(training: bool, fused: bool) -> Callable[[tuple[Tensor, Tensor | None], Tensor, float], Tensor]:
    """megatron-core's `bias_dropout_add` hook; returns f((x, bias), residual, dropout) -> residual + x + bias."""

    def add(x_with_bias: tuple[Tensor, Tensor | None], residual: Tensor, dropout: float) -> Tensor:
        x, bias = x_with_bias
        return residual + (x if bias is None else x + bias)

    return add
