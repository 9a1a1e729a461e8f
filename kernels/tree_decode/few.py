"""Lists of work of few rows in plain Python. Each function makes the very list that one of arrays makes of many rows.

Numpy takes a microsecond for an operation on a few numbers, several where its code has not run for a while, and a list
takes a hundred of them. In a step in which a block forks or joins, or after the end of a path, a GPU that runs a small
model waits for that.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from .pieces import BLOCK, NO_TAILS, Int32s, Stretch, Work
from .tiles import Tiles, ahead_of

FEW, FEW_TOKENS = 16, 64
"""Rows, and tokens that they bring, up to which a list is made here."""


def common_keys(pages: Int32s, lengths: Int32s, page_size: int, least: int) -> list[int] | None:
    """See `many.common_keys`."""
    first, keys = pages[:, 0].tolist(), lengths.tolist()
    if not any(page == after for page, after in pairwise(first)):
        return None
    common = []
    for row, same in enumerate((pages[1:] != pages[:-1]).argmax(1).tolist()):  # 0, too, where none differs
        if not same and first[row] == first[row + 1]:
            same = pages.shape[1]
        common.append(min(same * page_size, min(keys[row], keys[row + 1]) // page_size * page_size))
    return common if max(common) >= least else None


def list_alone(pages: Int32s, lengths: Int32s, *, kv_heads: int, programs: int, most_items: int, slots: int) -> Work:
    """See `many.list_alone`."""
    keys, width = lengths.tolist(), pages.shape[1]
    each = _cut_evenly(keys, _piece_of(keys, max(keys), kv_heads, programs, slots - 1), most_items)
    items: list[tuple[int, ...]] = []
    tokens: list[int] = []
    limits: list[int] = []
    counts = []
    for row, (end, step) in enumerate(zip(keys, each, strict=True)):
        begins = range(0, end, step)
        items += [(row * width, begin, min(begin + step, end), part) for part, begin in enumerate(begins)]
        tokens += [row] * len(begins)
        limits += [end] * len(begins)
        counts.append(len(begins))
    arrays = _columns(tokens, 1), _columns(limits, 1), NO_TAILS, np.array(counts, dtype=np.int32), pages.reshape(-1)
    return Work(np.array(items, dtype=np.int32), *arrays, slots if max(counts) > 1 else 1)


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
    """See `many.list_stretches`."""
    keys, edges = lengths.tolist(), borders.tolist()
    limits: list[int] = []
    for row, seen in enumerate(keys):
        limits += range(seen - edges[row + 1] + edges[row] + 1, seen + 1)
    sizes = [s.end - s.start for s in stretches for _ in range(edges[s.first], edges[s.last], sharers)]
    piece = _piece_of(sizes, max(keys), kv_heads, programs, slots - depth)
    items: list[tuple[int, ...]] = []
    tokens: list[int] = []
    ends: list[int] = []
    table: list[Int32s] = []
    counts, place = [0] * len(limits), 0
    for first, last, start, end in stretches:
        begin, used = start // page_size, -(-end // page_size)
        further = -(-(end + ahead) // page_size) - used if last - first == 1 else 0
        table += pages[first, begin:used], _nobody(further)
        base, step = place - begin, _even_piece(end - start, piece)
        place += used + further - begin
        begins = range(start, end, step)
        for query in range(edges[first], edges[last], sharers):
            # All queries of a stretch have been in the same stretches before, so they have as many parts so far.
            border, part = min(query + sharers, edges[last]), counts[query]
            items += [(base, key, min(key + step, end), number) for number, key in enumerate(begins, part)]
            nobody = sharers - (border - query)
            tokens += [*range(query, border), *([-1] * nobody)] * len(begins)
            ends += (limits[query:border] + [0] * nobody) * len(begins)
            counts[query:border] = [part + len(begins)] * (border - query)
    listed, array, tails = np.concatenate(table), np.array(items, dtype=np.int32), NO_TAILS
    if sharers > 1:
        listed = listed * np.int32(page_size) + np.int32(page_size - 1)
        tails = np.zeros((len(items), 3, sharers), dtype=np.int32)
        tails[:, 2] = array[:, 3:]
    most, room = slots if max(counts) > 1 else 1, ahead + min([-(seen + ahead) % page_size for seen in keys])
    arrays = _columns(tokens, sharers), _columns(ends, sharers), tails, np.array(counts, dtype=np.int32), listed
    return Work(array, *arrays, most, room=room)


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
    """See `many.list_tiles`."""
    keys, sharers = lengths.tolist(), tiles.sharers
    found = list(zip(tiles.first.tolist(), tiles.last.tolist(), tiles.shared.tolist(), strict=True))
    read = sum(keys) - sum([(last - first - 1) * shared for first, last, shared in found])
    ahead = ahead_of(read) if moves else 0
    stands = [_stand(keys[first:last], shared, page_size, ahead) for first, last, shared in found]
    sizes = [rows[-1][2] for rows in stands]
    each = _cut_evenly(sizes, _piece_of(sizes, max(sizes), kv_heads, programs, slots - 1), most_items)
    items: list[tuple[int, ...]] = []
    tokens: list[int] = []
    limits: list[int] = []
    tails: list[int] = []
    counts: list[int] = []
    table: list[Int32s] = []
    ends: list[int] = []
    cuts: list[int] = []
    base = 0
    for (first, _, shared), rows, size, step in zip(found, stands, sizes, each, strict=True):
        parts = [0] * len(rows)
        for begin in range(0, size, step):
            end = min(begin + step, size)
            items.append((base, begin, end, 0))
            token, limit, tail = [-1] * sharers, [0] * sharers, [0] * (3 * sharers)
            for place, (b, seen, room) in enumerate(rows):
                # Also rows whose next keys come there, so that the list can be moved on.
                if begin < shared or (b < end and begin < room):
                    token[place], limit[place] = first + place, seen
                    tail[place::sharers] = shared, b, parts[place]
                    parts[place] += 1
            tokens += token
            limits += limit
            tails += tail
        counts += parts
        head = shared // page_size
        table.append(pages[first, :head])
        for row, (_, seen, room) in enumerate(rows, first):
            used = -(-keys[row] // page_size)
            table += pages[row, head:used], _nobody((room - seen) // page_size)
            ends.append(base + -(-seen // page_size) - 1)
            cuts.append(-seen % page_size)
        base += size // page_size
    listed, last_pages = np.concatenate(table) * np.int32(page_size) + np.int32(page_size - 1), np.array(ends)
    listed[last_pages] -= np.array(cuts, dtype=np.int32)
    left, most = min([room - seen for rows in stands for _, seen, room in rows]), slots if max(counts) > 1 else 1
    arrays = _columns(tokens, sharers), _columns(limits, sharers), _columns(tails, 3, sharers)
    return Work(
        np.array(items, dtype=np.int32), *arrays, np.array(counts, dtype=np.int32), listed, most, last_pages, left
    )


def _columns(numbers: list[int], *shape: int) -> Int32s:
    """[items, ...]: numbers of one item after the other."""
    return np.array(numbers, dtype=np.int32).reshape(-1, *shape)


def _stand(keys: Sequence[int], shared: int, page_size: int, ahead: int) -> list[tuple[int, int, int]]:
    """Where the own keys of each row of a tile stand among the keys of the tile: from the first number to the second,
    and up to the third there are places for it."""
    stands, room = [], shared
    for own in (length - shared for length in keys):
        begin = room
        room = begin + -(-(own + ahead) // page_size) * page_size
        stands.append((begin, begin + own, room))
    return stands


def _nobody(count: int) -> Int32s:
    """Places for so many pages."""
    return _NOBODY[:count] if count <= len(_NOBODY) else np.full(count, -1, dtype=np.int32)


_NOBODY = np.full(64, -1, dtype=np.int32)


def _piece_of(sizes: Sequence[int], longest: int, kv_heads: int, programs: int, most: int) -> int:
    """See `pieces.piece_of`."""
    even = -(-sum(sizes) * kv_heads // programs)
    return -(-max(even, -(-longest // most), 1) // BLOCK) * BLOCK


def _even_piece(size: int, piece: int) -> int:
    """See `pieces.even_pieces`."""
    parts = max((size + piece // 2) // piece, 1)
    return -(-size // (parts * BLOCK)) * BLOCK


def _cut_evenly(sizes: Sequence[int], piece: int, most: int) -> list[int]:
    """Keys per item of each stretch; see `pieces.cut_evenly`."""
    most = max(most, len(sizes))
    while True:
        each = [_even_piece(size, piece) for size in sizes]
        if sum([-(-size // keys) for size, keys in zip(sizes, each, strict=True)]) <= most:
            return each
        piece += -(-piece // (8 * BLOCK)) * BLOCK
