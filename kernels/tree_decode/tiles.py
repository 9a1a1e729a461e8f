"""The list of work of rows that share pages, by tiles: what some rows share, and then each one's own keys.

A tile is looked at by all of its rows at once, so the tensor cores' rows that a row's own keys leave empty are few, and
what is shared is read once. Nobody's own keys stand in items of their own: where a tile is not cut, nothing is merged.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import numpy as np

from .pieces import LEAST_SHARED, Int32s, Ints, Work, counted, cut_evenly, most_cut, page_tables, piece_of

TIMES = 1.35, 1.0, 0.9
"""Time per key of tiles for as many queries as may share an item, half and a quarter as many, over that of half: they
choose the fastest, or nearly so, in the measured cases of 8 to 160 rows (H200, 28 query heads over 4)."""
PLAIN_TIME = 0.85
"""The same for rows that each read all of their keys. A key that is read again can come from the L2 cache."""
HUGE = 8192
"""Shared keys from which the rows of one tile read them in items of several rows, and their own in items of one: 8 rows
over 16,384 take 21.9 us so on an H200 and 24.4 by a tile, over 8,192 tiles win."""
AHEAD, AHEAD_OF_FEW = 16, 48
"""Keys of each row for which a list that is to be moved on has places. They are looked at, empty or not; half of them
are empty on average, one to two hundredths of all where a thousand keys are shared. The second where few keys are read:
there a step waits for the host when a list is made anew, and a graph of four paths took 0.150 ms with it and 0.149 with
the first (benchmarks/results/engine_small_steps_h200.json, on different machines)."""
FEW_KEYS = 4096
"""Of all rows together."""


class Tiles(NamedTuple):
    """Tiles that have every row once, in order; each [tiles]."""

    first: Ints
    last: Ints
    """Rows [first, last)."""
    shared: Ints
    """Keys that they share, in whole pages."""
    sharers: int
    """Rows that a tile has room for."""

    def is_one_over_many_keys(self, most: int) -> bool:
        """Whether all rows are in one tile as large as `most` rows need, over more than `HUGE` shared keys."""
        return len(self.first) == 1 and self.sharers == most and bool(self.shared[0] > HUGE)


def choose_tiles(common: Ints, lengths: Int32s, sharers: int, least: int | None) -> Tiles | None:
    """Tiles of the rows; None: it is faster if each reads all of its keys.

    Args:
        common: [rows - 1], keys in whole pages that rows share with the next.
        lengths: [rows], keys of each.
        sharers: most queries of an item.
        least: keys that are worth a tile, however long it takes; None: where it takes less time.
    """
    widths = [width for width in (sharers, sharers // 2, sharers // 4) if width > 1]
    least_shared, total = least or LEAST_SHARED, int(lengths.sum())
    groups = _flat_groups(common, least_shared)
    nested: list[list[tuple[int, int, int]]] = []
    if groups is not None:
        rows, shared = groups[1] - groups[0], groups[2]
        reads = [total - int(((rows - -(-rows // width)) * shared).sum()) for width in widths]
    else:
        # Lists, since numpy takes longer for a few numbers.
        ranges = _ranges(common.tolist(), lengths.tolist(), least_shared)
        found = [_tiles(ranges, width) for width in widths]
        reads, nested = [read for read, _ in found], [tiles for _, tiles in found]
    times = [read * time for read, time in zip(reads, TIMES, strict=False)]
    best = int(np.argmin(times)) if times else 0
    if not times or (least is None and times[best] > PLAIN_TIME * total):
        return None
    if groups is not None:
        return _even_tiles(*groups, widths[best])
    first, last, head = np.array(nested[best], dtype=np.int64).T
    return Tiles(first, last, head, widths[best])


def _flat_groups(common: Ints, least: int) -> tuple[Ints, Ints, Ints] | None:
    """(first row, row after the last, shared keys) of the groups in which neighbours share at least `least` keys; None
    if the rows of one share more with some than with all."""
    first = np.concatenate(([0], np.flatnonzero(common < least) + 1))
    last = np.append(first[1:], len(common) + 1)
    inner = np.append(common, 0)
    inner[last - 1] = -1  # what is shared with the next group
    high = np.maximum.reduceat(inner, first)
    inner[last - 1] = np.iinfo(inner.dtype).max
    low = np.minimum.reduceat(inner, first)
    alone = last - first == 1
    return None if ((high != low) & ~alone).any() else (first, last, np.where(alone, 0, low))


def _even_tiles(first: Ints, last: Ints, shared: Ints, sharers: int) -> Tiles:
    """Groups in tiles of about as many rows."""
    rows = last - first
    count = -(-rows // sharers)
    owner, index = counted(count)
    begin, end = (first[owner] + rows[owner] * number // count[owner] for number in (index, index + 1))
    return Tiles(begin, end, np.where(end - begin > 1, shared[owner], 0), sharers)


class _Range(NamedTuple):
    """Rows [first, last), which may be read together or as the ranges that they part into."""

    first: int
    last: int
    shared: int
    """Keys that all of them share; 0 where those are not worth a tile."""
    keys: int
    """Of all of them, added up."""
    parts: range
    """Which ranges of the list they part into, where neighbours share least; empty if they share one length."""


def _ranges(common: list[int], lengths: list[int], least: int) -> list[_Range]:
    """All rows and what they part into, step by step, each before its parts. Without recursion: where every row shares
    more with the next, there are as many steps as rows."""
    found: list[_Range] = []
    borders = [(0, len(lengths))]
    for first, last in borders:  # parts are put behind
        inner = common[first : last - 1]
        shared, parts = min(inner, default=0), range(0)
        if inner and (shared < least or max(inner) > shared):
            limit = max(shared, least - 1)
            ends = [first, *(row for row, keys in enumerate(inner, first + 1) if keys <= limit), last]
            parts = range(len(borders), len(borders) + len(ends) - 1)
            borders += pairwise(ends)
        found.append(_Range(first, last, shared if shared >= least else 0, sum(lengths[first:last]), parts))
    return found


def _tiles(ranges: list[_Range], sharers: int) -> tuple[int, list[tuple[int, int, int]]]:
    """Keys that are read, and (first row, last, shared keys) of the tiles that read least."""
    reads, together = [0] * len(ranges), [True] * len(ranges)
    for number, (first, last, shared, keys, parts) in reversed(list(enumerate(ranges))):
        rows = last - first
        reads[number] = keys - (rows - -(-rows // sharers)) * shared
        if parts and (not shared or reads[number] > sum([reads[part] for part in parts])):
            reads[number], together[number] = sum([reads[part] for part in parts]), False
    tiles, waiting = [], [0]
    while waiting:
        number = waiting.pop()
        first, last, shared, _, parts = ranges[number]
        if not together[number]:
            waiting += reversed(parts)
            continue
        count = -(-(last - first) // sharers)
        ends = [first + (last - first) * number // count for number in range(count + 1)]
        tiles += [(low, high, shared if high - low > 1 else 0) for low, high in pairwise(ends)]
    return reads[0], tiles


def list_tiles(
    pages: Int32s,
    lengths: Int32s,
    tiles: Tiles,
    *,
    page_size: int,
    kv_heads: int,
    processors: int,
    slots: int,
    moves: bool = False,
) -> Work:
    """The list of rows of one query each; arguments as of `work.divide_work`."""
    first, last, shared, sharers = tiles
    # [tiles, sharers]: keys below `shared` and `own` ones from `b` are those that a row sees, and [b, `room`) is kept
    # for it.
    rows = first[:, None] + np.arange(sharers)
    there = rows < last[:, None]
    own = np.where(there, lengths[np.where(there, rows, 0)] - shared[:, None], 0)
    ahead = ahead_of(int(shared.sum() + own.sum())) if moves else 0
    own_pages = -(-(own + ahead * there) // page_size)
    left = int((own_pages * page_size - own)[there].min())
    table, ends = _table(pages, lengths, tiles, page_size, ahead)
    room = shared[:, None] + np.cumsum(own_pages, 1) * page_size
    b = room - own_pages * page_size
    sizes = room[:, -1]
    base = (np.cumsum(sizes) - sizes) // page_size
    piece = piece_of(sizes, int(sizes.max()), kv_heads, 2 * processors, slots - 1)
    each, count = cut_evenly(sizes, piece, most_cut(processors, kv_heads))
    owner, index = counted(count)
    items = np.zeros((len(owner), 4), dtype=np.int32)
    items[:, 0], items[:, 1] = base[owner], index * each[owner]
    items[:, 2] = np.minimum(items[:, 1] + each[owner], sizes[owner])
    begin, end = items[:, 1:2], items[:, 2:3]
    # Also rows whose next keys come there, so that the list can be moved on.
    seen = there[owner] & ((begin < shared[owner, None]) | ((b[owner] < end) & (begin < room[owner])))
    before = np.cumsum(seen, 0) - seen
    part = before - before[(np.cumsum(count) - count)[owner]]
    shared_end = np.repeat(shared[:, None], sharers, 1)
    tails = np.stack((shared_end[owner], b[owner], part), 1) * seen[:, None]
    tokens = np.where(seen, rows[owner], -1).astype(np.int32)
    counts = np.bincount(tokens[seen], minlength=len(lengths)).astype(np.int32)
    most = slots if counts.max() > 1 else 1
    limits = ((b + own)[owner] * seen).astype(np.int32)
    return Work(items, tokens, limits, tails.astype(np.int32), counts, table, most, ends, left)


def ahead_of(keys: int) -> int:
    """Keys of each row for which there are places, if so many are read in all."""
    return AHEAD_OF_FEW if keys <= FEW_KEYS else AHEAD


def _table(pages: Int32s, lengths: Int32s, tiles: Tiles, page_size: int, ahead: int) -> tuple[Int32s, Ints]:
    """Last slots of the pages of every tile, flat, and where among them the last page of each row stands. There is a
    place for the pages of `ahead` more keys of each row."""
    rows = np.arange(len(lengths))
    heads = np.stack((tiles.first, tiles.last, np.zeros_like(tiles.first), tiles.shared), 1)
    shared = np.repeat(tiles.shared, tiles.last - tiles.first)
    own = np.stack((rows, rows + 1, shared, lengths), 1)
    # The head of a tile, then the rows that have it.
    places = np.concatenate((tiles.first + np.arange(len(tiles.first)), rows + 1 + np.repeat(
        np.arange(len(tiles.first)), tiles.last - tiles.first)))  # fmt: skip
    stretches = np.empty((len(places), 4), dtype=np.int64)
    stretches[places] = np.concatenate((heads, own))
    further = np.full(len(places), ahead)
    further[places[: len(heads)]] = 0
    numbers, bases = page_tables(pages, stretches, page_size, further if ahead else None)
    table = numbers * np.int32(page_size) + np.int32(page_size - 1)  # -1 of -1
    ends = (bases + -(-stretches[:, 3] // page_size) - 1)[places[len(heads) :]]
    some = lengths > shared
    table[ends[some]] -= (-lengths[some]) % page_size
    return table, ends
