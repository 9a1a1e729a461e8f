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
LONG = 4096
"""Keys of a row from which two programs for every multiprocessor are worth a merge where there is one without: 32 rows
of 8,192 keys take 128 us instead of 149 on an H200, 32 of 1,083 keys 24.0 instead of 23.3."""
LEAST_TILE, SHARERS = 16, 8
"""Rows of the tensor cores' smallest tile, and queries for whose heads tiles are made; see `most_sharers`."""

Int32s = npt.NDArray[np.int32]
Ints = npt.NDArray[np.int64]


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


class Seats(NamedTuple):
    """Queries that look at a stretch of keys together; each [seats]."""

    base: Ints
    """Where in the pages the one of key 0 would stand."""
    start: Ints
    end: Ints
    """Keys [start, end)."""
    first: Ints
    last: Ints
    """Queries [first, last)."""


def most_parts(queries: int) -> int:
    """Parts a query may have in a step of `queries`: many where few queries must keep the whole GPU busy."""
    return 8 if queries > 64 else max(16, min(64, 512 // queries))


def most_cut(processors: int, kv_heads: int) -> int:
    """Items into which rows are cut that would be fewer: two programs for every multiprocessor."""
    return max(2 * processors // kv_heads, 1)


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
    rows, tokens = len(counts), int(borders[-1])
    stretches = _stretches(pages, lengths, page_size, least_shared or LEAST_SHARED)
    # Rows of several queries need the larger tiles with and without others.
    if rows == tokens and (stretches is None or least_shared is None):
        pieces = _pieces_alone(lengths, kv_heads, processors, slots)
        if stretches is None or not _pays(stretches, lengths, pieces, sharers, kv_heads / processors):
            return _alone(pages, lengths, pieces, slots)
    limits = lengths if rows == tokens else np.repeat(lengths - counts + 1 - borders[:-1], counts) + np.arange(tokens)
    depth = 0 if stretches is None else _depth(stretches, borders)
    if stretches is None or depth > slots // 2:
        stretches, depth = np.zeros((rows, 4), dtype=np.int64), 1
        stretches[:, 0] = np.arange(rows)
        stretches[:, 1], stretches[:, 3] = stretches[:, 0] + 1, lengths
    listed, bases = _tables(pages, stretches, page_size)
    seats = _seats(stretches, bases, borders, sharers)
    piece = _piece(seats.end - seats.start, int(lengths.max()), kv_heads, 2 * processors, slots - depth)
    return _cut(seats, piece, listed, limits.astype(np.int32), slots, sharers)


def _pays(stretches: Ints, lengths: Int32s, pieces: Ints, sharers: int, programs_per_processor: float) -> bool:
    """Whether rows of one query each read shared keys once in less time than each for itself; see `PLAIN_TIME`.

    Args:
        stretches: see `_stretches`.
        lengths: keys of each row.
        pieces: keys of its items where it reads all of them itself. That ends with the longest item: 24 rows of four
            key/value heads are not cut, and a quarter of 132 multiprocessors has none of their items.
        programs_per_processor: of one item: key/value heads over multiprocessors.
    """
    first, last, start, end = stretches.T
    shared = int((-(-(last - first) // sharers) * (end - start)).sum())
    longest = int(np.minimum(pieces, lengths).max())
    plain_keys, shared_keys = max(lengths.sum() * programs_per_processor, longest), shared * programs_per_processor
    return bool(SHARED_TIME[0] + SHARED_TIME[1] * shared_keys < PLAIN_TIME[0] + PLAIN_TIME[1] * plain_keys)


def _counted(counts: Ints) -> tuple[Ints, Ints]:
    """For as many things of each owner as `counts` says: [sum], whose each one is, and its number among the owner's."""
    owner = np.repeat(np.arange(len(counts)), counts)
    return owner, np.arange(len(owner)) - (np.cumsum(counts) - counts)[owner]


def _tables(pages: Int32s, stretches: Ints, page_size: int) -> tuple[Int32s, Ints]:
    """The pages of the stretches, flat, and where among them the page of each one's key 0 would stand."""
    begins = stretches[:, 2] // page_size
    counts = -(-stretches[:, 3] // page_size) - begins
    owner, index = _counted(counts)
    there = (stretches[:, 0] * pages.shape[1] + begins)[owner] + index
    return pages.reshape(-1)[there], np.cumsum(counts) - counts - begins


def _seats(stretches: Ints, bases: Ints, borders: Ints, sharers: int) -> Seats:
    """One for every stretch and group of queries that look at it together."""
    first, last, start, end = stretches.T
    query, border = borders[first], borders[last]
    owner, index = _counted(-(-(border - query) // sharers))
    query = query[owner] + index * sharers
    return Seats(bases[owner], start[owner], end[owner], query, np.minimum(query + sharers, border[owner]))


def _piece(sizes: npt.NDArray[np.signedinteger], longest: int, kv_heads: int, programs: int, most: int) -> int:
    """Keys of an item, for about so many programs, but no more than `most` parts for a query."""
    even = -(-int(sizes.sum()) * kv_heads // programs)
    return -(-max(even, -(-longest // most), LEAST_PIECE) // BLOCK) * BLOCK


def _even_pieces(sizes: npt.NDArray[np.signedinteger], piece: int) -> npt.NDArray[np.signedinteger]:
    """Keys per item of each stretch: about `piece`, but so that the last one is not a small rest."""
    parts = np.maximum((sizes + piece // 2) // piece, 1)
    return -(-sizes // (parts * BLOCK)) * BLOCK


def _pieces_alone(lengths: Int32s, kv_heads: int, processors: int, slots: int) -> Ints:
    """Keys of the items of each row, if rows of one query each share nothing."""
    # Two programs for every multiprocessor hide each other's waits; where there is about one anyway, a second part and
    # the merge cost more than that unless the rows are long.
    rows, longest = len(lengths), int(lengths.max())
    twice = 2 * rows * kv_heads <= processors or int(lengths.sum()) >= LONG * rows
    programs = 2 * processors if twice else processors
    piece = _piece(lengths, longest, kv_heads, programs, slots - 1)
    # More programs than may run at once would leave a rest that runs alone.
    most = max(rows, most_cut(processors, kv_heads))
    while int((-(-lengths // (pieces := _even_pieces(lengths, piece)))).sum()) > most:
        piece += -(-piece // (8 * BLOCK)) * BLOCK
    return pieces


def _alone(pages: Int32s, lengths: Int32s, pieces: Ints, slots: int) -> Work:
    """The work of rows with one query each that share nothing: what most decode steps are."""
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


def _depth(stretches: Ints, borders: Ints) -> int:
    """Most stretches that one query is in."""
    size = int(borders[-1]) + 1
    begun, ended = (np.bincount(borders[stretches[:, row]], minlength=size) for row in (0, 1))
    return int(np.cumsum(begun - ended).max())


def _cut(seats: Seats, piece: int, pages: Int32s, limits: Int32s, slots: int, sharers: int) -> Work:
    """Cut every stretch into pieces and number the parts of each query."""
    base, start, end, first, last = seats
    each = _even_pieces(end - start, piece)
    pieces = -(-(end - start) // each)
    owner, index = _counted(pieces)
    counts = [0] * len(limits)
    before = []
    for number, query, border in zip(pieces.tolist(), first.tolist(), last.tolist(), strict=True):
        # All queries of a stretch have been in the same stretches before, so they have as many parts so far.
        parts = counts[query]
        before.append(parts)
        counts[query:border] = [parts + number] * (border - query)
    items = np.empty((len(owner), 4), dtype=np.int32)
    begin = start[owner] + index * each[owner]
    items[:, 0], items[:, 1] = base[owner], begin
    items[:, 2] = np.minimum(begin + each[owner], end[owner])
    items[:, 3] = np.array(before)[owner] + index
    tokens = first[:, None] + np.arange(sharers)
    tokens[tokens >= last[:, None]] = -1
    seen = limits[tokens]
    seen[tokens < 0] = 0
    most = slots if max(counts) > 1 else 1
    return Work(items, tokens.astype(np.int32)[owner], seen[owner], np.array(counts, dtype=np.int32), pages, most)


def _stretches(pages: Int32s, lengths: Int32s, page_size: int, least: int) -> Ints | None:
    """Every row's keys, as stretches, [stretches, 4]: rows [first, second), which list the same pages for the keys
    [third, fourth). What neighbours share comes before what is each one's own. None: they share nothing worth it."""
    if len(lengths) == 1 or not (pages[1:, 0] == pages[:-1, 0]).any():
        return None
    other = pages[1:] != pages[:-1]
    same = other.argmax(1)  # 0, too, where none differs
    same[~other[np.arange(len(same)), same]] = pages.shape[1]
    common = np.minimum(same * page_size, np.minimum(lengths[1:], lengths[:-1]) // page_size * page_size)
    if not (common >= least).any():
        return None
    found: list[int] = []
    # Lists, since numpy takes longer for a few numbers.
    _split(0, len(lengths), 0, common.tolist(), lengths.tolist(), least, found)
    return np.array(found, dtype=np.int64).reshape(-1, 4)


def _split(
    first: int, last: int, start: int, common: list[int], lengths: list[int], least: int, found: list[int]
) -> None:
    """Add the stretches of the rows [first, last) from `start` on, where all of them have been equal so far."""
    if last - first == 1:
        if start < lengths[first]:
            found += (first, last, start, lengths[first])
        return
    inner = common[first : last - 1]
    end = min(inner)
    if end - start >= least:
        found += (first, last, start, end)
        start = end
    # Where two neighbours share little more, the rows part.
    parts = [row for row, keys in enumerate(inner, first + 1) if keys - start < least]
    if not parts:
        # All share enough more than nothing, but `end` was short of it: part at the least of them.
        parts = [first + inner.index(end) + 1]
    for low, high in zip([first, *parts], [*parts, last], strict=True):
        _split(low, high, start, common, lengths, least, found)
