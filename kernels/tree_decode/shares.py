"""The list of work of many rows of unequal length that share nothing: equal shares of their keys for all programs.

Where rows are cut into items of about one size, short ones, and what is left of others, are smaller items, and each
program has only one. Here the keys of all rows stand one after the other, and each program has as many of them as any
other: the end of one row, some whole ones and the begin of another.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from .pieces import BLOCK, NO_TAILS, Int32s, Work, most_cut

UNEVEN = 1.4
"""Keys of the longest row over those of all on average, from which equal shares take less time."""
ROWS = 0.48
"""From so many rows times key/value heads for each multiprocessor on."""
KEYS = 450
"""And from so many keys of a program on. All by whole steps on an H200 (benchmarks/results/decode_tiles_h200.md)."""


def takes_shares(lengths: npt.NDArray[np.int32], kv_heads: int, processors: int) -> bool:
    """Whether equal shares take less time than items of about one size."""
    return bool(
        len(lengths) * kv_heads > ROWS * processors
        and lengths.max() > UNEVEN * lengths.mean()
        and lengths.sum() > KEYS * most_cut(processors, kv_heads)
    )


def list_shares(pages: Int32s, lengths: npt.NDArray[np.int32], *, programs: int, slots: int) -> Work:
    """The list, for so many programs of each key/value head; other arguments as of `work.divide_work`."""
    blocks = -(-lengths.astype(np.int64) // BLOCK)
    ends = np.cumsum(blocks)
    begins, total = ends - blocks, int(ends[-1])
    share = max(-(-total // programs), -(-int(blocks.max()) // (slots - 1)))
    cuts = np.arange(0, total, share)
    first = np.union1d(begins, cuts)  # blocks with which items begin
    row = np.searchsorted(ends, first, side="right")
    counts = np.bincount(row)
    items = np.empty((len(first), 4), dtype=np.int32)
    items[:, 0], items[:, 1] = row * pages.shape[1], (first - begins[row]) * BLOCK
    items[:, 2] = np.minimum((np.append(first[1:], total) - begins[row]) * BLOCK, lengths[row])
    items[:, 3] = np.arange(len(row)) - (np.cumsum(counts) - counts)[row]
    shares = np.full(programs + 1, len(first), dtype=np.int32)
    shares[: len(cuts)] = np.searchsorted(first, cuts)
    tokens, limits = row.astype(np.int32)[:, None], lengths[row][:, None]
    return Work(items, tokens, limits, NO_TAILS, counts.astype(np.int32), pages.reshape(-1), slots, shares=shares)
