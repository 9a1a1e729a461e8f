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
LEAST_PIECE = 2 * BLOCK
"""Fewer keys are not worth a program and a part of their own."""
LEAST_SHARED = 4 * BLOCK
"""Shared keys below which rows are never looked at together."""
PLAIN_TIME, SHARED_TIME = (6.2, 0.012), (8.1, 0.030)
"""Microseconds (a, b) of attention over u keys of the busiest multiprocessor, a + b u, if every row reads all its keys,
and if shared ones are read once. Keys that are read again come from the L2 cache, and items of several rows have larger
tiles, of which a row's own keys use little. Fitted on an H200 to 1 to 64 rows of Qwen2.5-7B's heads, each with 256 keys
of its own, after 512 to 32,768 shared ones (benchmarks/results/decode_tiles_h200.md). The second has a margin of 15 %,
so that sharing is not the slower way there; rows with many more keys of their own were not measured."""
LEAST_TILE, SHARERS = 16, 8
"""Rows of the tensor cores' smallest tile, and queries for whose heads tiles are made; see `most_sharers`."""

Int32s = npt.NDArray[np.int32]


class Work(NamedTuple):
    """The list for `triton_decode.tree_decode_triton`."""

    items: Int32s
    """[items, 4]: where in `pages` the page of key 0 would stand, first key, end of the keys, and which part of its
    queries this is. A stretch from 0 to 0 is padding."""
    tokens: Int32s
    """[items, sharers], the queries; -1 is none."""
    limits: Int32s
    """[items, sharers], keys of the row that each query sees."""
    counts: Int32s
    """[tokens], parts of each query."""
    pages: Int32s
    """Flat: the pages of every stretch, one after the other."""
    slots: int
    """Most parts a query may have; 1 if all have one, so that nothing is to be merged."""


class Stretch(NamedTuple):
    """Keys [start, end) of the rows [first, last), which list the same pages for them."""

    first: int
    last: int
    start: int
    end: int


def most_parts(queries: int) -> int:
    """Parts a query may have in a step of `queries`: many where few queries must keep the whole GPU busy."""
    return 8 if queries > 64 else max(16, min(64, 512 // queries))


def most_sharers(heads: int, kv_heads: int) -> int:
    """Queries that may share an item, with so many query heads over so many key/value heads: as many as the tile for
    the heads of eight has rows for."""
    rows = max(LEAST_TILE, 1 << (SHARERS * heads // kv_heads - 1).bit_length())
    return rows * kv_heads // heads


def divide_work(
    pages: Int32s,
    lengths: npt.NDArray[np.int32],
    borders: npt.NDArray[np.int64],
    *,
    page_size: int,
    kv_heads: int,
    processors: int,
    slots: int,
    sharers: int,
    least_shared: int | None = None,
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
        sharers: queries that may share an item, see `most_sharers`.
        least_shared: keys that neighbouring rows must share to be looked at together; None: where that takes less time
            (`PLAIN_TIME`, `SHARED_TIME`).
    """
    counts = np.diff(borders)
    stretches = _stretches(pages, lengths, page_size, least_shared or LEAST_SHARED)
    # Rows of several queries need the larger tiles with and without others.
    if len(counts) == borders[-1] and (stretches is None or least_shared is None):
        plain = _alone(pages, lengths, kv_heads, processors, slots)
        if stretches is None or not _pays(stretches, plain, sharers, kv_heads / processors):
            return plain
    limits = np.repeat(lengths - counts + 1, counts) + np.arange(borders[-1]) - np.repeat(borders[:-1], counts)
    depth = 0 if stretches is None else _depth(stretches, borders)
    if stretches is None or depth > slots // 2:
        stretches, depth = [Stretch(row, row + 1, 0, int(length)) for row, length in enumerate(lengths)], 1
    tables, bases = _tables(pages, stretches, page_size)
    seats = _seats(stretches, bases, borders, sharers)
    piece = _piece(seats[:, 2] - seats[:, 1], int(lengths.max()), kv_heads, 2 * processors, slots - depth)
    return _cut(seats, piece, tables, limits.astype(np.int32), slots, sharers)


def _pays(stretches: list[Stretch], plain: Work, sharers: int, programs_per_processor: float) -> bool:
    """Whether rows of one query each read shared keys once in less time than each for itself; see `PLAIN_TIME`.

    Args:
        plain: the list in which each reads all its keys. It ends with its longest item: 24 rows of four key/value heads
            are not cut, and a quarter of 132 multiprocessors has none of their items.
        programs_per_processor: of one item: key/value heads over multiprocessors.
    """
    sizes = plain.items[:, 2] - plain.items[:, 1]
    shared = sum(-(-(stretch.last - stretch.first) // sharers) * (stretch.end - stretch.start) for stretch in stretches)
    plain_keys, shared_keys = max(sizes.sum() * programs_per_processor, sizes.max()), shared * programs_per_processor
    return bool(SHARED_TIME[0] + SHARED_TIME[1] * shared_keys < PLAIN_TIME[0] + PLAIN_TIME[1] * plain_keys)


def _tables(pages: Int32s, stretches: list[Stretch], page_size: int) -> tuple[Int32s, list[int]]:
    """The pages of the stretches, flat, and where among them the page of each one's key 0 would stand."""
    parts = [pages[stretch.first, stretch.start // page_size : -(-stretch.end // page_size)] for stretch in stretches]
    begins = np.cumsum([0, *map(len, parts)])
    bases = [int(begin) - stretch.start // page_size for begin, stretch in zip(begins[:-1], stretches, strict=True)]
    return np.concatenate(parts), bases


def _seats(
    stretches: list[Stretch], bases: list[int], borders: npt.NDArray[np.int64], sharers: int
) -> npt.NDArray[np.int64]:
    """One for every stretch and group of queries that look at it together, [seats, 5]: where its page of key 0 would
    stand, first key, end of the keys, first query, end of the queries."""
    return np.array(
        [
            (base, stretch.start, stretch.end, token, min(token + sharers, int(borders[stretch.last])))
            for base, stretch in zip(bases, stretches, strict=True)
            for token in range(int(borders[stretch.first]), int(borders[stretch.last]), sharers)
        ],
        dtype=np.int64,
    )


def _piece(sizes: npt.NDArray[np.signedinteger], longest: int, kv_heads: int, programs: int, most: int) -> int:
    """Keys of an item, for about so many programs, but no more than `most` parts for a query."""
    even = -(-int(sizes.sum()) * kv_heads // programs)
    return -(-max(even, -(-longest // most), LEAST_PIECE) // BLOCK) * BLOCK


def _even_pieces(sizes: npt.NDArray[np.signedinteger], piece: int) -> npt.NDArray[np.signedinteger]:
    """Keys per item of each stretch: about `piece`, but so that the last one is not a small rest."""
    parts = np.maximum((sizes + piece // 2) // piece, 1)
    return -(-sizes // (parts * BLOCK)) * BLOCK


def _alone(pages: Int32s, lengths: npt.NDArray[np.int32], kv_heads: int, processors: int, slots: int) -> Work:
    """The work of rows with one query each that share nothing: what most decode steps are."""
    # Two programs for every multiprocessor hide each other's waits; where there is about one anyway, a second part and
    # the merge would cost more than that.
    programs = 2 * processors if 2 * len(lengths) * kv_heads <= processors else processors
    piece = _piece(lengths, int(lengths.max()), kv_heads, programs, slots - 1)
    pieces = _even_pieces(lengths, piece)
    counts = -(-lengths // pieces)
    rows = np.arange(len(lengths), dtype=np.int32)
    owner = np.repeat(rows, counts)
    part = np.arange(len(owner), dtype=np.int32) - np.repeat(np.cumsum(counts) - counts, counts)
    items = np.empty((len(owner), 4), dtype=np.int32)
    pieces = pieces[owner]
    items[:, 0], items[:, 1], items[:, 3] = owner * pages.shape[1], part * pieces, part
    limits = lengths[owner]
    np.minimum(items[:, 1] + pieces, limits, out=items[:, 2])
    most = slots if len(owner) > len(lengths) else 1
    return Work(items, owner[:, None], limits[:, None], counts, pages.reshape(-1), most)


def _depth(stretches: list[Stretch], borders: npt.NDArray[np.int64]) -> int:
    """Most stretches that one query is in."""
    depth = np.zeros(int(borders[-1]), dtype=np.int64)
    for stretch in stretches:
        depth[borders[stretch.first] : borders[stretch.last]] += 1
    return int(depth.max())


def _cut(seats: npt.NDArray[np.int64], piece: int, pages: Int32s, limits: Int32s, slots: int, sharers: int) -> Work:
    """Cut every stretch into pieces and number the parts of each query."""
    sizes = seats[:, 2] - seats[:, 1]
    each = _even_pieces(sizes, piece)
    pieces = -(-sizes // each)
    owner = np.repeat(np.arange(len(seats)), pieces)
    index = np.arange(len(owner)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    start = seats[owner, 1] + index * each[owner]
    counts = np.zeros(len(limits), dtype=np.int32)
    base = np.zeros(len(seats), dtype=np.int64)
    for seat, (number, begin, end) in enumerate(zip(pieces, seats[:, 3], seats[:, 4], strict=True)):
        # All queries of a stretch have been in the same stretches before, so they have as many parts so far.
        base[seat] = counts[begin]
        counts[begin:end] = base[seat] + number
    items = np.empty((len(owner), 4), dtype=np.int32)
    items[:, 0], items[:, 1] = seats[owner, 0], start
    items[:, 2], items[:, 3] = np.minimum(start + each[owner], seats[owner, 2]), base[owner] + index
    tokens = seats[owner, 3, None] + np.arange(sharers)
    tokens = np.where(tokens < seats[owner, 4, None], tokens, -1).astype(np.int32)
    limits = np.where(tokens >= 0, limits[tokens], 0).astype(np.int32)
    return Work(items, tokens, limits, counts, pages, slots if counts.max() > 1 else 1)


def _stretches(pages: Int32s, lengths: npt.NDArray[np.int32], page_size: int, least: int) -> list[Stretch] | None:
    """Every row's keys, as stretches; what neighbours share comes before what is each one's own. None: they share
    nothing worth it."""
    rows = len(lengths)
    if rows == 1 or not (pages[1:, 0] == pages[:-1, 0]).any():
        return None
    same = np.logical_and.accumulate(pages[1:] == pages[:-1], axis=1).sum(1) * page_size
    common = np.minimum(same, np.minimum(lengths[1:], lengths[:-1]) // page_size * page_size)
    if not (common >= least).any():
        return None
    found: list[Stretch] = []
    _split(0, rows, 0, common, lengths, least, found)
    return found


def _split(
    first: int,
    last: int,
    start: int,
    common: npt.NDArray[np.int64],
    lengths: npt.NDArray[np.int32],
    least: int,
    found: list[Stretch],
) -> None:
    """Add the stretches of the rows [first, last) from `start` on, where all of them have been equal so far."""
    if last - first == 1:
        if start < lengths[first]:
            found.append(Stretch(first, last, start, int(lengths[first])))
        return
    inner = common[first : last - 1]
    end = int(inner.min())
    if end - start >= least:
        found.append(Stretch(first, last, start, end))
        start = end
    # Where two neighbours share little more, the rows part.
    parts = np.flatnonzero(inner - start < least) + first + 1
    if not len(parts):
        # All share enough more than nothing, but `end` was short of it: part at the least of them.
        parts = np.array([first + int(inner.argmin()) + 1])
    for low, high in zip([first, *parts], [*parts, last], strict=True):
        _split(int(low), int(high), start, common, lengths, least, found)
