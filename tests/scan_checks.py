"""Equality of two scans."""

from __future__ import annotations

import torch

from megatron_multiverse.kernels.structure_scan import StructureScan


def scan_difference(got: StructureScan, want: StructureScan) -> str | None:
    """Name of the first field in which they differ; entries of index lists behind their counts are free."""
    for name in ("malformed", "position_ids", "r", "segment_end", "work_order"):
        a, b = getattr(got, name).cpu(), getattr(want, name).cpu()
        if a.dtype != b.dtype or not torch.equal(a, b):
            return name
    for name in ("q_partial", "q_full", "k_partial", "k_full"):
        a, b = getattr(got.lists, name), getattr(want.lists, name)
        if not torch.equal(a.counts.cpu(), b.counts.cpu()):
            return f"{name}.counts"
        valid = torch.arange(b.indices.shape[-1]) < b.counts.cpu()[..., None]
        if not torch.equal(a.indices.cpu()[valid], b.indices.cpu()[valid]):
            return f"{name}.indices"
    return None


def assert_same_scan(got: StructureScan, want: StructureScan) -> None:
    """Every field equal."""
    difference = scan_difference(got, want)
    assert difference is None, f"{difference} differs"
