"""Attention under the Multiverse visibility rule (arXiv 2506.09991, section 4).

Importing this needs torch alone; Triton, FlexAttention and FlashAttention 4 load when a backend is used.
"""

from __future__ import annotations

from .dense import dense_attention, dense_plan
from .flash4 import flash4_attention, flash4_plan, flash4_problem
from .flex import flex_attention, flex_plan, flex_problem
from .layout import AttentionLayout
from .reference import count_visible_pairs, multiverse_attention_reference, visibility
from .tiles import TileLists, tile_lists

__all__ = [
    "AttentionLayout",
    "TileLists",
    "count_visible_pairs",
    "dense_attention",
    "dense_plan",
    "flash4_attention",
    "flash4_plan",
    "flash4_problem",
    "flex_attention",
    "flex_plan",
    "flex_problem",
    "multiverse_attention_reference",
    "tile_lists",
    "visibility",
]
