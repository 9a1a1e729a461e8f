"""Copies of cached keys and values, needed where a branch forks or joins inside a page."""

from megatron_multiverse.kernels.kv_copy.reference import copy_slots_reference

copy_slots = copy_slots_reference

__all__ = ["copy_slots", "copy_slots_reference"]
