"""From token ids to positions, visibility labels and tile lists, once per microbatch and without leaving the GPU."""

from __future__ import annotations

from .reference import structure_scan_reference
from .result import MAX_DEPTH, StructureScan
from .scan import structure_scan

__all__ = ["MAX_DEPTH", "StructureScan", "structure_scan", "structure_scan_reference"]
