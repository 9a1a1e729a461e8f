"""The one place that chooses the attention backend. The choice and its reason are logged once per process.

A backend is a function (q [b,h,s,d], k, v [b,g,s,d], visible bool [b,1,s,s], softmax_scale) -> [b,h,s,d].
To add one: write it in kernels/multiverse_attention, register it in `BACKENDS`, let `_auto` pick it.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable

from torch import Tensor

from megatron_multiverse.errors import ConfigError
from megatron_multiverse.kernels.multiverse_attention import dense_attention

logger = logging.getLogger(__name__)

AttentionBackend = Callable[[Tensor, Tensor, Tensor, Tensor, float | None], Tensor]

BACKENDS: dict[str, AttentionBackend] = {"dense": dense_attention}


def _auto(device_type: str) -> tuple[str, str]:
    """Name of the backend for "auto" on this kind of device, and the reason."""
    return "dense", f"it is the only one built in, device {device_type}"


@functools.cache
def select_backend(name: str, device_type: str) -> AttentionBackend:
    """Return the backend called `name`, or the best one for the device if name is "auto".

    Raises:
        ConfigError: no backend of that name.
    """
    reason = "it was asked for"
    if name == "auto":
        name, reason = _auto(device_type)
    if name not in BACKENDS:
        raise ConfigError(f"unknown attention_backend {name!r}, allowed: auto, {', '.join(BACKENDS)}")
    logger.info("attention backend: %s (%s)", name, reason)
    return BACKENDS[name]
