"""The sum over tensor parallel GPUs that stands between two layers, with the residual and the norm."""

from __future__ import annotations

from .reference import sum_norm_reference

__all__ = ["sum_norm_reference"]
