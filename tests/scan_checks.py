"""Equality of two scans, or of two sets of tile lists."""

from __future__ import annotations

import torch

from megatron_multiverse.kernels.multiverse_attention import TileLists
from megatron_multiverse.kernels.structure_scan import StructureScan


def scan_difference(got: StructureScan, want: StructureScan) -> str | None:
    """Name of the first field in which they differ; entries of index lists behind their counts are free."""
    for name in ("malformed", "position_ids", "r", "segment_end", "work_order"):
        a, b = getattr(got, name).cpu(), getattr(want, name).cpu()
        if a.dtype != b.dtype or not torch.equal(a, b):
            return name
    return lists_difference(got.lists, want.lists)


def lists_difference(got: TileLists, want: TileLists) -> str | None:
    """Name of the first lists in which they differ; entries behind their counts are free."""
    for name in ("q_partial", "q_full", "k_partial", "k_full"):
        a, b = getattr(got, name), getattr(want, name)
        if not torch.equal(a.counts.cpu(), b.counts.cpu()):
            return f"{name}.counts"
        if not torch.equal(a.valid().cpu(), b.valid().cpu()):
            return f"{name}.indices"
    return None


def assert_same_scan(got: StructureScan, want: StructureScan) -> None:
    """Every field equal."""
    difference = scan_difference(got, want)
    assert difference is None, f"{difference} differs"
