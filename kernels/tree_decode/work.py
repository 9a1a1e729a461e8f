"""What the kernels of tree_decode read in a step: which stretch of whose keys, for which queries.

The list is made on the host, once per step for all layers. It knows the exact lengths, so it cuts long rows into
pieces of equal size until all multiprocessors have work, and it sees where neighbouring rows list the same pages: they
are read once for all of them. Siblings of a fork are neighbours in a step. Rows of one query each share tiles, see
`tiles.py`; where rows bring several, each stretch of pages that some of them list becomes items of its own.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from .pieces import (
    BLOCK,
    LEAST_PIECE,
    LEAST_SHARED,
    LEAST_TILE,
    NO_TAILS,
    Int32s,
    Ints,
    Work,
    counted,
    cut_evenly,
    even_pieces,
    most_cut,
    most_parts,
    page_tables,
    piece_of,
)
from .tiles import AHEAD, choose_tiles, list_tiles

LONG = 4096
"""Keys of a row from which two programs for every multiprocessor are worth a merge where there is one without: 32 rows
of 8,192 keys take 128 us instead of 149 on an H200, 32 of 1,083 keys 24.0 instead of 23.3."""


AT_ONCE = 2.5
"""Programs per multiprocessor up to which reading all keys of all rows, row by row, takes less time than tiles for more
than two queries (an H200, benchmarks/kernels/results/tree_decode_few_keys_h200.json). It reads more, but what few
programs read takes no longer for that, and products for one query are smaller, unless both have `LEAST_TILE` rows, as
with one query head per group."""


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
    moves: bool = False,
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
        least_shared: keys that neighbouring rows must share to be looked at together; None: where that takes less time,
            see `tiles.choose_tiles`.
        moves: whether there are to be places for further pages, where rows of one query each share keys, so that the
            list can be moved on; see `successive.py`.
    """
    counts = np.diff(borders)
    rows, tokens = len(counts), int(borders[-1])
    common = _common(pages, lengths, page_size, least_shared or LEAST_SHARED)
    if rows == tokens:
        tiles = None if common is None else choose_tiles(common, lengths, sharers, least_shared)
        if tiles is not None and least_shared is None and tiles.sharers > 2 and sharers < LEAST_TILE:
            programs = -(-lengths // LEAST_PIECE).sum() * kv_heads
            tiles = None if programs <= AT_ONCE * processors else tiles
        if tiles is None:
            return _alone(pages, lengths, kv_heads, processors, slots)._replace(room=BLOCK if moves else 0)
        if not tiles.is_one_over_many_keys(sharers):
            return list_tiles(
                pages, lengths, tiles, page_size=page_size, kv_heads=kv_heads, processors=processors, slots=slots,
                moves=moves,
            )  # fmt: skip
    # Rows of several queries need the larger tiles with and without others.
    stretches = None if common is None else _stretches(common, lengths, least_shared or LEAST_SHARED)
    limits = lengths if rows == tokens else np.repeat(lengths - counts + 1 - borders[:-1], counts) + np.arange(tokens)
    depth = 0 if stretches is None else _depth(stretches, borders)
    if stretches is None or depth > slots // 2:
        stretches, depth = np.zeros((rows, 4), dtype=np.int64), 1
        stretches[:, 0] = np.arange(rows)
        stretches[:, 1], stretches[:, 3] = stretches[:, 0] + 1, lengths
    lone = stretches[:, 1] - stretches[:, 0] == 1
    # Places behind every row's own pages, which no item reaches before they are needed.
    ahead = AHEAD if moves and lone.sum() == rows == tokens else 0
    room = ahead + int((-(lengths + ahead) % page_size).min())
    listed, bases = page_tables(pages, stretches, page_size, ahead * lone if ahead else None)
    if sharers > 1:  # all of a page may be read: items end where their rows do
        listed = listed * np.int32(page_size) + np.int32(page_size - 1)
    seats = _seats(stretches, bases, borders, sharers)
    piece = piece_of(seats.end - seats.start, int(lengths.max()), kv_heads, 2 * processors, slots - depth)
    return _cut(seats, piece, listed, limits.astype(np.int32), slots, sharers)._replace(room=room)


def divide_rows(
    pages: Int32s,
    lengths: npt.NDArray[np.int32],
    borders: npt.NDArray[np.int64],
    rows: npt.NDArray[np.bool_],
    *,
    page_size: int,
    kv_heads: int,
    processors: int,
    sharers: int,
    slots: int | None = None,
) -> Work:
    """The work of some rows of a step; arguments as of `divide_work`.

    Args:
        rows: [rows], which ones; at least one.
        slots: by default what suits as many tokens, see `most_parts`.

    Returns:
        The list, with the step's numbers of the tokens; its `counts` end with the last of them.
    """
    counts = np.diff(borders)
    numbers = np.flatnonzero(np.repeat(rows, counts))
    work = divide_work(
        pages[rows],
        lengths[rows],
        np.concatenate(([0], np.cumsum(counts[rows]))),
        page_size=page_size,
        kv_heads=kv_heads,
        processors=processors,
        slots=slots or most_parts(len(numbers)),
        sharers=sharers,
    )
    if numbers[-1] + 1 == len(numbers):
        return work
    parts = np.zeros(numbers[-1] + 1, dtype=np.int32)
    parts[numbers] = work.counts
    tokens = np.where(work.tokens < 0, -1, numbers[work.tokens]).astype(np.int32)
    return work._replace(tokens=tokens, counts=parts)


def _seats(stretches: Ints, bases: Ints, borders: Ints, sharers: int) -> Seats:
    """One for every stretch and group of queries that look at it together."""
    first, last, start, end = stretches.T
    query, border = borders[first], borders[last]
    owner, index = counted(-(-(border - query) // sharers))
    query = query[owner] + index * sharers
    return Seats(bases[owner], start[owner], end[owner], query, np.minimum(query + sharers, border[owner]))


def _alone(pages: Int32s, lengths: Int32s, kv_heads: int, processors: int, slots: int) -> Work:
    """The work of rows with one query each that share nothing: what most decode steps are."""
    # Two programs for every multiprocessor hide each other's waits; where there is about one anyway, a second part and
    # the merge cost more than that unless the rows are long.
    rows, longest = len(lengths), int(lengths.max())
    twice = 2 * rows * kv_heads <= processors or int(lengths.sum()) >= LONG * rows
    programs = 2 * processors if twice else processors
    piece = piece_of(lengths, longest, kv_heads, programs, slots - 1)
    pieces, counts = cut_evenly(lengths, piece, most_cut(processors, kv_heads))
    owner = np.repeat(np.arange(rows, dtype=np.int32), counts)
    part = np.arange(len(owner), dtype=np.int32) - np.repeat(np.cumsum(counts) - counts, counts)
    items = np.empty((len(owner), 4), dtype=np.int32)
    pieces = pieces[owner]
    items[:, 0], items[:, 1], items[:, 3] = owner * pages.shape[1], part * pieces, part
    limits = lengths[owner]
    np.minimum(items[:, 1] + pieces, limits, out=items[:, 2])
    most = slots if len(owner) > len(lengths) else 1
    return Work(items, owner[:, None], limits[:, None], NO_TAILS, counts, pages.reshape(-1), most)


def _depth(stretches: Ints, borders: Ints) -> int:
    """Most stretches that one query is in."""
    size = int(borders[-1]) + 1
    begun, ended = (np.bincount(borders[stretches[:, row]], minlength=size) for row in (0, 1))
    return int(np.cumsum(begun - ended).max())


def _cut(seats: Seats, piece: int, pages: Int32s, limits: Int32s, slots: int, sharers: int) -> Work:
    """Cut every stretch into pieces and number the parts of each query."""
    base, start, end, first, last = seats
    each = even_pieces(end - start, piece)
    pieces = -(-(end - start) // each)
    owner, index = counted(pieces)
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
    tails = NO_TAILS
    if sharers > 1:
        tails = np.zeros((len(owner), 3, sharers), dtype=np.int32)
        tails[:, 2] = items[:, 3:]
    return Work(
        items, tokens.astype(np.int32)[owner], seen[owner], tails, np.array(counts, dtype=np.int32), pages, most
    )


def _common(pages: Int32s, lengths: Int32s, page_size: int, least: int) -> Ints | None:
    """[rows - 1], keys in whole pages that each row shares with the next; None: nowhere as many as `least`."""
    if len(lengths) == 1 or not (pages[1:, 0] == pages[:-1, 0]).any():
        return None
    other = pages[1:] != pages[:-1]
    same = other.argmax(1)  # 0, too, where none differs
    same[~other[np.arange(len(same)), same]] = pages.shape[1]
    common = np.minimum(same * page_size, np.minimum(lengths[1:], lengths[:-1]) // page_size * page_size)
    return common if (common >= least).any() else None


def _stretches(common: Ints, lengths: Int32s, least: int) -> Ints:
    """Every row's keys, as stretches, [stretches, 4]: rows [first, second), which list the same pages for the keys
    [third, fourth). What neighbours share comes before what is each one's own."""
    found: list[int] = []
    # Lists, since numpy takes longer for a few numbers.
    shared, ends = common.tolist(), lengths.tolist()
    waiting = [(0, len(ends), 0)]
    while waiting:
        # All of these rows have been equal up to `start`.
        first, last, start = waiting.pop()
        if last - first == 1:
            if start < ends[first]:
                found += (first, last, start, ends[first])
            continue
        inner = shared[first : last - 1]
        end = min(inner)
        if end - start >= least:
            found += (first, last, start, end)
            start = end
        # Where two neighbours share little more, the rows part.
        parts = [row for row, keys in enumerate(inner, first + 1) if keys - start < least]
        waiting += [(low, high, start) for low, high in pairwise([first, *parts, last])][::-1]
    return np.array(found, dtype=np.int64).reshape(-1, 4)
