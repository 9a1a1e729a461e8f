"""Positions of training rows that are not those of the layout: with gaps, or as the official code counts them."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from megatron_multiverse.structure import Document, Layout
from megatron_multiverse.structure.document import BlockSpan

LARGEST_GAP = 512
"""Positions that are left out at once, see `gapped`."""


def gapped(positions: npt.NDArray[np.int64], seams: list[int], rng: random.Random) -> npt.NDArray[np.int64]:
    """Positions [N] with some left out before each seam, up to `LARGEST_GAP`, few more often than many.

    What is equal stays equal and the order stays, so branches still run side by side. Longer problems have their parts
    further apart; so does such a row (compare randomised positions, arXiv 2305.16843).
    """
    moved = positions.copy()
    for seam in seams:
        moved[positions >= seam] += round(LARGEST_GAP ** rng.random()) - 1
    return moved


def official_positions(document: Document) -> npt.NDArray[np.int64]:
    """Positions [N] as the official training code counts them (arXiv 2506.09991, code release, `train/utils.py`).

    With g the position of `</Goal>`, each `<Path>` has g + 1, `<Conclusion>` the largest position of any `</Path>` plus
    1, and the newline in a gap counts on from what stands before it in the text. Ours are one further in each path, and
    two after each block.
    """
    positions = np.arange(document.num_tokens)

    def place(start: int, end: int, blocks: list[BlockSpan], shift: int) -> int:
        """Place tokens [start, end), the first at start + shift; returns the position after the last."""
        for block in blocks:
            positions[start : block.goal_end] = np.arange(start, block.goal_end) + shift
            goal_position = block.goal_end - 1 + shift
            gap_position, longest = goal_position + 1, goal_position
            for path in block.paths:
                positions[path.start] = gap_position
                gap_position = place(path.start + 1, path.end, path.blocks, goal_position - path.start)
                longest = max(longest, gap_position - 1)
            positions[block.region_end] = gap_position
            start = block.region_end + 1
            shift = longest + 1 - start
        positions[start:end] = np.arange(start, end) + shift
        return end + shift

    place(0, document.num_tokens, document.blocks, 0)
    return positions


def with_positions(layout: Layout, positions: npt.NDArray[np.int64]) -> Layout:
    """The same layout with other positions [N]; visibility and loss stay as they are."""
    return with_columns(layout, positions, layout.r.astype(np.int64))


def with_columns(layout: Layout, positions: npt.NDArray[np.int64], r: npt.NDArray[np.int64]) -> Layout:
    """The same layout with other positions [N] and labels [N]; loss stays as it is."""
    index = np.arange(layout.num_tokens)
    shifts = np.stack([positions - index, r - index], axis=1)
    starts = np.flatnonzero(np.any(np.diff(shifts, axis=0, prepend=shifts[:1] - 1) != 0, axis=1))
    return replace(layout, segments=np.column_stack([starts, shifts[starts]]))
