"""Rotary position embedding by explicit position ids. `fused.py` and `fused_qkv.py` are Triton (and need triton)."""

from __future__ import annotations

from .reference import inverse_frequencies, llama3_frequencies, rope_angles, rope_reference
from .table import rope_table, rotate_by_table, rotate_qkv_by_table

__all__ = [
    "inverse_frequencies",
    "llama3_frequencies",
    "rope_angles",
    "rope_reference",
    "rope_table",
    "rotate_by_table",
    "rotate_qkv_by_table",
]
