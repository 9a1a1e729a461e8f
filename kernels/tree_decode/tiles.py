"""The list of work of rows that share pages, by tiles: what some rows share, and then each one's own keys.

A tile is looked at by all of its rows at once, so the tensor cores' rows that a row's own keys leave empty are few, and
what is shared is read once. Nobody's own keys stand in items of their own: where a tile is not cut, nothing is merged.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import numpy as np

from .pieces import LEAST_SHARED, Int32s, Ints, counted

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
FEW_ROWS = 64
"""Up to so many rows tiles are chosen by lists, beyond by arrays where that is simple: numpy takes longer for a few."""


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


def choose_tiles(common: list[int], lengths: Int32s, sharers: int, least: int | None) -> Tiles | None:
    """Tiles of the rows; None: it is faster if each reads all of its keys.

    Args:
        common: [rows - 1], keys in whole pages that rows share with the next.
        lengths: [rows], keys of each.
        sharers: most queries of an item.
        least: keys that are worth a tile, however long it takes; None: where it takes less time.
    """
    least_shared, total = least or LEAST_SHARED, int(lengths.sum())
    widths = [width for width in (sharers, sharers // 2, sharers // 4) if width > 1]
    groups = _flat_groups(np.array(common), least_shared) if len(lengths) > FEW_ROWS else None
    ranges: list[_Range] = []
    together: list[list[bool]] = []
    if groups is not None:
        rows, shared = groups[1] - groups[0], groups[2]
        reads = [total - int(((rows - -(-rows // width)) * shared).sum()) for width in widths]
    else:
        # Lists, since numpy takes longer for a few numbers.
        ranges = _ranges(common, lengths.tolist(), least_shared)
        found = [_least_reads(ranges, width) for width in widths]
        reads, together = [read for read, _ in found], [whether for _, whether in found]
    times = [read * time for read, time in zip(reads, TIMES, strict=False)]
    if not times or (least is None and min(times) > PLAIN_TIME * total):
        return None
    best = times.index(min(times))
    if groups is not None:
        return _even_tiles(*groups, widths[best])
    first, last, head = np.array(_tiles(ranges, together[best], widths[best])).T
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


def _least_reads(ranges: list[_Range], sharers: int) -> tuple[int, list[bool]]:
    """The fewest keys that are read, and for each range whether its rows are read together then."""
    reads, together = [0] * len(ranges), [True] * len(ranges)
    for number in range(len(ranges) - 1, -1, -1):
        first, last, shared, keys, parts = ranges[number]
        rows = last - first
        reads[number] = keys - (rows - -(-rows // sharers)) * shared
        if parts:
            apart = sum(reads[parts.start : parts.stop])
            if not shared or reads[number] > apart:
                reads[number], together[number] = apart, False
    return reads[0], together


def _tiles(ranges: list[_Range], together: list[bool], sharers: int) -> list[tuple[int, int, int]]:
    """(first row, last, shared keys) of tiles, each range's together or as the ranges that it parts into."""
    tiles: list[tuple[int, int, int]] = []
    waiting = [0]
    while waiting:
        number = waiting.pop()
        first, last, shared, _, parts = ranges[number]
        if not together[number]:
            waiting += reversed(parts)
            continue
        rows = last - first
        count = -(-rows // sharers)
        ends = [first + rows * number // count for number in range(count + 1)]
        tiles += [(low, high, shared if high - low > 1 else 0) for low, high in pairwise(ends)]
    return tiles


def ahead_of(keys: int) -> int:
    """Keys of each row for which there are places, if so many are read in all."""
    return AHEAD_OF_FEW if keys <= FEW_KEYS else AHEAD
