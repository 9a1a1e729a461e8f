"""Rotary position embedding by explicit position ids."""

from __future__ import annotations

from .reference import inverse_frequencies, llama3_frequencies, rope_angles, rope_reference

__all__ = ["inverse_frequencies", "llama3_frequencies", "rope_angles", "rope_reference"]
