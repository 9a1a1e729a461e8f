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
from megatron_multiverse.kernels.multiverse_attention import dense_attention, dense_mask

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class AttentionBackend:
    """One way to compute attention under the visibility rule."""

    prepare: Callable[[Tensor, Tensor | None, torch.dtype], Any]
    """(r [b, s], index [b, s] or None, dtype of q) -> plan, made once per microbatch."""
    attend: Callable[[Tensor, Tensor, Tensor, Any, float | None], Tensor]
    """(q [b, h, s, d], k, v [b, g, s, d], plan, softmax_scale) -> [b, h, s, d]."""


BACKENDS: dict[str, AttentionBackend] = {
    "dense": AttentionBackend(prepare=dense_mask, attend=dense_attention),
}


def _auto(device_type: str) -> tuple[str, str]:
    """Name of the backend for "auto" on this kind of device, and the reason."""
    return "dense", f"the only backend built in; device {device_type}"


@functools.cache
def select_backend(name: str, device_type: str) -> AttentionBackend:
    """Return the backend called `name`, or the best one for the device if name is "auto".

    Raises:
        ConfigError: no backend of that name.
    """
    reason = "asked for"
    if name == "auto":
        name, reason = _auto(device_type)
    if name not in BACKENDS:
        raise ConfigError(f"unknown attention_backend {name!r}, allowed: auto, {', '.join(BACKENDS)}")
    logger.info("attention backend: %s (%s)", name, reason)
    return BACKENDS[name]
