"""Attention under the Multiverse visibility rule (arXiv 2506.09991, section 4): `multiverse_attention`.

Importing this needs torch alone; Triton, FlexAttention and FlashAttention 4 load when a backend is used.
"""

from __future__ import annotations

from .backends import BACKENDS, check_backend, choose_backend, multiverse_attention
from .layout import AttentionCase, AttentionLayout
from .reference import count_visible_pairs, multiverse_attention_reference, visibility
from .tiles import TileLists, tile_lists

__all__ = [
    "BACKENDS",
    "AttentionCase",
    "AttentionLayout",
    "TileLists",
    "check_backend",
    "choose_backend",
    "count_visible_pairs",
    "multiverse_attention",
    "multiverse_attention_reference",
    "tile_lists",
    "visibility",
]
