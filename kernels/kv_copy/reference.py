"""Copies of cached keys and values between slots: the plain version."""

from __future__ import annotations

from torch import Tensor


def copy_slots_reference(keys: Tensor, values: Tensor, source: Tensor, target: Tensor) -> None:
    """Copy slots of a paged cache, all layers at once, in place.

    Every source is read before any target is written, so a slot may be both.

    Args:
        keys: ``[layers, slots, kv heads, head dim]``.
        values: same shape as `keys`.
        source: int64 ``[n]``, slots to read.
        target: int64 ``[n]``, slots to write, all different.
    """
    keys.index_copy_(1, target, keys.index_select(1, source))
    values.index_copy_(1, target, values.index_select(1, source))
