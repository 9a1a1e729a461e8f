"""Attention under the Multiverse visibility rule (arXiv 2506.09991, section 4)."""

from __future__ import annotations

from .dense import dense_attention, dense_mask
from .reference import multiverse_attention_reference, visibility

__all__ = ["dense_attention", "dense_mask", "multiverse_attention_reference", "visibility"]
