"""Copies of cached keys and values between slots: the plain version."""

from __future__ import annotations

from torch import Tensor


def copy_slots_reference(cached: Tensor, source: Tensor, target: Tensor) -> None:
    """Copy slots of a paged cache, keys and values of all layers at once, in place.

    Every source is read before any target is written, so a slot may be both.

    Args:
        cached: ``[layers, slots, kv heads, head dim]``, once for keys and once for values.
        source: int64 ``[n]``, slots to read.
        target: int64 ``[n]``, slots to write, all different.
    """
    cached.index_copy_(1, target, cached.index_select(1, source))
