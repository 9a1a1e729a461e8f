"""What the kernels of tree_decode read in a step: which stretch of whose keys, for which queries.

The list is made on the host, once per step for all layers. It knows the exact lengths, so it cuts long rows into
pieces of equal size until all multiprocessors have work, and it sees where neighbouring rows list the same pages: that
stretch becomes one item for all of them and is read once. Siblings of a fork are neighbours in a step.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

BLOCK = 64
"""Keys a program looks at at once; pieces are multiples of it."""
LEAST_SHARED = 4 * BLOCK
"""Shared keys below which rows are not looked at together: the merge would cost more than the reads it saves."""
SHARERS = 8
"""Queries that share an item."""

Int32s = npt.NDArray[np.int32]


class Work(NamedTuple):
    """The list for `triton_decode.tree_decode_triton`."""

    items: Int32s
    """[items, 4]: where the row's pages begin in the flat page table, first key, end of the keys, and which part of its
    queries this is. A stretch from 0 to 0 is padding."""
    tokens: Int32s
    """[items, sharers], the queries; -1 is none."""
    limits: Int32s
    """[items, sharers], keys of the row that each query sees."""
    counts: Int32s
    """[tokens], parts of each query."""
    slots: int
    """Most parts a query may have."""


class Stretch(NamedTuple):
    """Keys [start, end) of the rows [first, last), which list the same pages for them."""

    first: int
    last: int
    start: int
    end: int


def divide_work(
    pages: Int32s,
    lengths: npt.NDArray[np.int32],
    borders: npt.NDArray[np.int64],
    *,
    page_size: int,
    kv_heads: int,
    processors: int,
    slots: int = 64,
) -> Work:
    """The work of a step, as `tree_decode_reference` describes it.

    Args:
        pages: [rows, p].
        lengths: [rows], keys that the last token of each row sees.
        borders: [rows + 1], row i brings the tokens [borders[i], borders[i + 1]).
        page_size: keys per page.
        kv_heads: key/value heads; every item is looked at once per head.
        processors: multiprocessors to be kept busy.
        slots: most parts a query may have.
    """
    width = pages.shape[1]
    counts = np.diff(borders)
    single = len(counts) == borders[-1]  # one query per row
    offsets = 0 if single else np.arange(borders[-1]) - np.repeat(borders[:-1], counts)
    limits = (lengths if single else np.repeat(lengths - counts + 1, counts) + offsets).astype(np.int32)
    stretches = _stretches(pages, lengths, page_size)
    if stretches is not None and (depth := _depth(stretches, borders)) > slots // 2:
        stretches = None
    if stretches is None:
        stretches, depth = _alone(lengths) if not single else None, 1
    sharers = 1 if stretches is None else SHARERS
    if stretches is None:
        rows = np.arange(len(lengths))
        seats = np.stack((rows * width, np.zeros_like(rows), lengths, rows, rows + 1), axis=1)
    else:
        # One seat for every stretch and group of at most `sharers` queries.
        seats = np.array(
            [
                (s.first * width, s.start, s.end, token, min(token + sharers, int(borders[s.last])))
                for s in stretches
                for token in range(int(borders[s.first]), int(borders[s.last]), sharers)
            ],
            dtype=np.int64,
        )
    even = -(-int((seats[:, 2] - seats[:, 1]).sum()) * kv_heads // (2 * processors))
    most = -(-int(lengths.max()) // (slots - depth))
    piece = -(-max(even, most, 1) // BLOCK) * BLOCK
    return _cut(seats, piece, sharers, limits, slots)


def _depth(stretches: list[Stretch], borders: npt.NDArray[np.int64]) -> int:
    """Most stretches that one query is in."""
    depth = np.zeros(int(borders[-1]), dtype=np.int64)
    for stretch in stretches:
        depth[borders[stretch.first] : borders[stretch.last]] += 1
    return int(depth.max())


def _cut(seats: npt.NDArray[np.int64], piece: int, sharers: int, limits: Int32s, slots: int) -> Work:
    """Cut every stretch into pieces and number the parts of each query."""
    pieces = -(-(seats[:, 2] - seats[:, 1]) // piece)
    owner = np.repeat(np.arange(len(seats)), pieces)
    index = np.arange(len(owner)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    start = seats[owner, 1] + index * piece
    counts = np.zeros(len(limits), dtype=np.int32)
    base = np.zeros(len(seats), dtype=np.int64)
    if sharers == 1:
        counts[:] = pieces
    for seat, (number, begin, end) in enumerate(
        zip(pieces, seats[:, 3], seats[:, 4], strict=True) if sharers > 1 else ()
    ):
        # All queries of a stretch have been in the same stretches before, so they have as many parts so far.
        base[seat] = counts[begin]
        counts[begin:end] = base[seat] + number
    items = np.empty((len(owner), 4), dtype=np.int32)
    items[:, 0], items[:, 1] = seats[owner, 0], start
    items[:, 2], items[:, 3] = np.minimum(start + piece, seats[owner, 2]), base[owner] + index
    tokens = seats[owner, 3, None] + np.arange(sharers)
    tokens = np.where(tokens < seats[owner, 4, None], tokens, -1).astype(np.int32)
    return Work(items, tokens, np.where(tokens >= 0, limits[tokens], 0).astype(np.int32), counts, slots)


def _stretches(pages: Int32s, lengths: npt.NDArray[np.int32], page_size: int) -> list[Stretch] | None:
    """Every row's keys, as stretches; what neighbours share comes before what is each one's own. None: they share
    nothing worth it."""
    rows = len(lengths)
    common = np.zeros(max(rows - 1, 0), dtype=np.int64)
    if rows > 1:
        same = np.logical_and.accumulate(pages[1:] == pages[:-1], axis=1).sum(1) * page_size
        common = np.minimum(same, np.minimum(lengths[1:], lengths[:-1]) // page_size * page_size)
    if not (common >= LEAST_SHARED).any():
        return None
    found: list[Stretch] = []
    _split(0, rows, 0, common, lengths, found)
    return found


def _alone(lengths: npt.NDArray[np.int32]) -> list[Stretch]:
    return [Stretch(row, row + 1, 0, int(length)) for row, length in enumerate(lengths)]


def _split(
    first: int,
    last: int,
    start: int,
    common: npt.NDArray[np.int64],
    lengths: npt.NDArray[np.int32],
    found: list[Stretch],
) -> None:
    """Add the stretches of the rows [first, last) from `start` on, where all of them have been equal so far."""
    if last - first == 1:
        found.append(Stretch(first, last, start, int(lengths[first])))
        return
    inner = common[first : last - 1]
    end = int(inner.min())
    if end - start >= LEAST_SHARED:
        found.append(Stretch(first, last, start, end))
        start = end
    # Where two neighbours share little more, the rows part.
    parts = np.flatnonzero(inner - start < LEAST_SHARED) + first + 1
    if not len(parts):
        # All share enough more than nothing, but `end` was short of it: part at the least of them.
        parts = np.array([first + int(inner.argmin()) + 1])
    for low, high in zip([first, *parts], [*parts, last], strict=True):
        _split(int(low), int(high), start, common, lengths, found)
