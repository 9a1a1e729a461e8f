"""Lists of work made by arrays, each kind as `few.py` makes it of few rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from .pieces import (
    NO_TAILS,
    Int32s,
    Ints,
    Stretch,
    Work,
    counted,
    cut_evenly,
    even_pieces,
    page_tables,
    piece_of,
)
from .tiles import Tiles, ahead_of


def common_keys(pages: Int32s, lengths: Int32s, page_size: int, least: int) -> list[int] | None:
    """[rows - 1], keys in whole pages that each row shares with the next; None: nowhere as many as `least`."""
    if not (pages[1:, 0] == pages[:-1, 0]).any():
        return None
    other = pages[1:] != pages[:-1]
    same = np.where(other.any(1), other.argmax(1), pages.shape[1])
    common = np.minimum(same * page_size, np.minimum(lengths[1:], lengths[:-1]) // page_size * page_size)
    return common.tolist() if (common >= least).any() else None


def list_alone(pages: Int32s, lengths: Int32s, *, kv_heads: int, programs: int, most_items: int, slots: int) -> Work:
    """The list of rows with one query each that share nothing: what most decode steps are.

    Args:
        pages, lengths, kv_heads, slots: see `work.divide_work`.
        programs: about how many there are to be.
        most_items: into how many rows are cut that would be fewer.
    """
    rows = len(lengths)
    piece = piece_of(lengths, int(lengths.max()), kv_heads, programs, slots - 1)
    pieces, counts = cut_evenly(lengths, piece, most_items)
    owner = np.repeat(np.arange(rows, dtype=np.int32), counts)
    part = np.arange(len(owner), dtype=np.int32) - np.repeat(np.cumsum(counts) - counts, counts)
    items = np.empty((len(owner), 4), dtype=np.int32)
    pieces = pieces[owner]
    items[:, 0], items[:, 1], items[:, 3] = owner * pages.shape[1], part * pieces, part
    limits = lengths[owner]
    np.minimum(items[:, 1] + pieces, limits, out=items[:, 2])
    most = slots if len(owner) > len(lengths) else 1
    return Work(items, owner[:, None], limits[:, None], NO_TAILS, counts, pages.reshape(-1), most)


def list_stretches(
    pages: Int32s,
    lengths: Int32s,
    borders: npt.NDArray[np.int64],
    stretches: Sequence[Stretch],
    *,
    depth: int,
    ahead: int,
    page_size: int,
    kv_heads: int,
    programs: int,
    slots: int,
    sharers: int,
) -> Work:
    """The list of rows of any number of queries.

    Args:
        pages, lengths, borders, page_size, kv_heads, slots, sharers: see `work.divide_work`.
        stretches: of the rows' keys, what neighbours share before what is each one's own.
        depth: most stretches that one row is in.
        ahead: places for further keys behind the stretches of single rows.
        programs: see `list_alone`.
    """
    counts, spans = np.diff(borders), np.array(stretches)
    limits = np.repeat(lengths - counts + 1 - borders[:-1], counts) + np.arange(borders[-1])
    lone = spans[:, 1] - spans[:, 0] == 1
    listed, bases = page_tables(pages, spans, page_size, ahead * lone if ahead else None)
    if sharers > 1:  # all of a page may be read: items end where their rows do
        listed = listed * np.int32(page_size) + np.int32(page_size - 1)
    seats = _seats(spans, bases, borders, sharers)
    piece = piece_of(seats.end - seats.start, int(lengths.max()), kv_heads, programs, slots - depth)
    room = ahead + int((-(lengths + ahead) % page_size).min())
    return _cut(seats, piece, listed, limits.astype(np.int32), slots, sharers)._replace(room=room)


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


def _seats(stretches: Ints, bases: Ints, borders: Ints, sharers: int) -> Seats:
    """One for every stretch and group of queries that look at it together."""
    first, last, start, end = stretches.T
    query, border = borders[first], borders[last]
    owner, index = counted(-(-(border - query) // sharers))
    query = query[owner] + index * sharers
    return Seats(bases[owner], start[owner], end[owner], query, np.minimum(query + sharers, border[owner]))


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


def list_tiles(
    pages: Int32s,
    lengths: Int32s,
    tiles: Tiles,
    *,
    page_size: int,
    kv_heads: int,
    programs: int,
    most_items: int,
    slots: int,
    moves: bool,
) -> Work:
    """The list of rows of one query each, by tiles.

    Args:
        pages, lengths, page_size, kv_heads, slots, moves: see `work.divide_work`.
        tiles: of the rows.
        programs: see `list_alone`.
        most_items: see `list_alone`.
    """
    first, last, shared, sharers = tiles
    # [tiles, sharers]: keys below `shared` and `own` ones from `b` are those that a row sees, and [b, `room`) is kept
    # for it.
    rows = first[:, None] + np.arange(sharers)
    there = rows < last[:, None]
    own = np.where(there, lengths[np.where(there, rows, 0)] - shared[:, None], 0)
    ahead = ahead_of(int(shared.sum() + own.sum())) if moves else 0
    own_pages = -(-(own + ahead * there) // page_size)
    left = int((own_pages * page_size - own)[there].min())
    table, ends = _table(pages, lengths, first, last, shared, page_size, ahead)
    room = shared[:, None] + np.cumsum(own_pages, 1) * page_size
    b = room - own_pages * page_size
    sizes = room[:, -1]
    base = (np.cumsum(sizes) - sizes) // page_size
    piece = piece_of(sizes, int(sizes.max()), kv_heads, programs, slots - 1)
    each, count = cut_evenly(sizes, piece, most_items)
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


def _table(
    pages: Int32s, lengths: Int32s, first: Ints, last: Ints, head: Ints, page_size: int, ahead: int
) -> tuple[Int32s, Ints]:
    """Last slots of the pages of every tile, flat, and where among them the last page of each row stands. There is a
    place for the pages of `ahead` more keys of each row."""
    rows = np.arange(len(lengths))
    heads = np.stack((first, last, np.zeros_like(first), head), 1)
    shared = np.repeat(head, last - first)
    own = np.stack((rows, rows + 1, shared, lengths), 1)
    # The head of a tile, then the rows that have it.
    number = np.arange(len(first))
    places = np.concatenate((first + number, rows + 1 + np.repeat(number, last - first)))
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
