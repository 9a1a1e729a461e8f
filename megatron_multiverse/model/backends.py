"""The one place that chooses the attention backend. The choice and its reason are logged once per process.

A backend has two halves: `prepare` turns the labels of a microbatch into whatever the kernel wants (a mask, tile
lists), once for all layers; `attend` is called by every layer. To add one: write its kernel in
kernels/multiverse_attention, register it in `BACKENDS`, let `_auto` pick it.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_multiverse.errors import ConfigError
from megatron_multiverse.kernels.multiverse_attention import (
    AttentionLayout as AttentionLayout,
)
from megatron_multiverse.kernels.multiverse_attention import (
    dense_attention,
    dense_plan,
    flash4_attention,
    flash4_plan,
    flash4_problem,
    flex_attention,
    flex_plan,
    flex_problem,
)

logger = logging.getLogger(__name__)


def _no_problem(device_type: str, dtype: torch.dtype, head_dim: int) -> str | None:
    return None


@dataclass(frozen=True)
class AttentionBackend:
    """One way to compute attention under the visibility rule."""

    prepare: Callable[[AttentionLayout, torch.dtype], Any]
    """(layout, dtype of q) -> plan, made once per microbatch."""
    attend: Callable[[Tensor, Tensor, Tensor, Any, float | None], Tensor]
    """(q [b, h, s_q, d], k, v [b, g, s_k, d], plan, softmax_scale) -> [b, h, s_q, d]."""
    problem: Callable[[str, torch.dtype, int], str | None] = _no_problem
    """(device type, dtype, d) -> why this backend cannot run there, or None."""


BACKENDS: dict[str, AttentionBackend] = {
    "flash4": AttentionBackend(flash4_plan, flash4_attention, flash4_problem),
    "flex": AttentionBackend(flex_plan, flex_attention, flex_problem),
    "dense": AttentionBackend(dense_plan, dense_attention),
}
"""Fastest first: "auto" takes the first that can run."""


def multiverse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: AttentionLayout,
    *,
    softmax_scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attention under the visibility rule: query i sees key j iff j is not later and no block has them in
    different paths.

    Args:
        q: [b, h, s_q, d], rotated.
        k: [b, g, s_k, d], rotated; head i of q uses head i // (h / g).
        v: [b, g, s_k, d].
        layout: labels of the tokens; hand the same object to every layer of a microbatch.
        softmax_scale: factor on the scores; default d ** -0.5.
        backend: a name in `BACKENDS`, or "auto" for the fastest that runs here.

    Returns:
        [b, h, s_q, d] in q's dtype; 0 for a query that sees no key.

    Raises:
        ConfigError: the backend does not exist or cannot run here.
        ValueError: the shapes do not fit the layout.
    """
    chosen = select_backend(backend, q.device.type, q.dtype, q.shape[-1])
    layout.check(q, k, v)
    return chosen.attend(q, k, v, layout.plan(chosen.prepare, q.dtype), softmax_scale)


def _auto(device_type: str, dtype: torch.dtype, head_dim: int) -> tuple[str, str]:
    """Name of the backend for "auto", and the reason."""
    if device_type == "cpu":
        return "dense", "on the CPU"
    if dtype not in (torch.bfloat16, torch.float16):
        return "dense", f"{dtype} is for exactness, not for speed"
    reasons: list[str] = []
    for name, backend in BACKENDS.items():
        problem = backend.problem(device_type, dtype, head_dim)
        if problem is None:
            return name, "; ".join(["the fastest that runs here", *reasons])
        reasons.append(f"not {name}: {problem}")
    raise AssertionError("dense runs everywhere")


def select_backend(name: str, device_type: str, dtype: torch.dtype, head_dim: int) -> AttentionBackend:
    """Return the backend called `name`, or the best one for device, dtype and head width if name is "auto".

    Raises:
        ConfigError: no backend of that name, or it cannot run here; the message says why.
    """
    return _select(name, device_type, dtype, head_dim, torch.are_deterministic_algorithms_enabled())


@functools.cache
def _select(name: str, device_type: str, dtype: torch.dtype, head_dim: int, deterministic: bool) -> AttentionBackend:
    reason = "asked for"
    if name == "auto":
        name, reason = _auto(device_type, dtype, head_dim)
    if name not in BACKENDS:
        raise ConfigError(f"unknown attention_backend {name!r}, allowed: auto, {', '.join(BACKENDS)}")
    problem = BACKENDS[name].problem(device_type, dtype, head_dim)
    if problem is not None:
        raise ConfigError(f"attention_backend {name!r} cannot run here: {problem}; or set attention_backend to auto")
    logger.info("attention backend: %s (%s)", name, reason)
    return BACKENDS[name]
