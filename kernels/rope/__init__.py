"""Rotary position embedding by explicit position ids. The Triton kernel stands in `fused.py` (needs triton)."""

from __future__ import annotations

from .reference import inverse_frequencies, llama3_frequencies, rope_angles, rope_reference
from .table import rope_table, rotate_by_table

__all__ = [
    "inverse_frequencies",
    "llama3_frequencies",
    "rope_angles",
    "rope_reference",
    "rope_table",
    "rotate_by_table",
]
