"""What the kernels of tree_decode read in a step: which stretch of whose keys, for which queries.

The list is made on the host, once per step for all layers. It knows the exact lengths, so it cuts long rows into
pieces of equal size until all multiprocessors have work, and it sees where neighbouring rows list the same pages: they
are read once for all of them. Siblings of a fork are neighbours in a step. Rows of one query each share tiles, see
`tiles.py`; where rows bring several, each stretch of pages that some of them list becomes items of its own. Here is
decided what kind of list it is; `few.py` and `many.py` make it, `shares.py` where lengths differ.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import numpy.typing as npt

from . import few, many
from .pieces import (
    BLOCK,
    LEAST_SHARED,
    LEAST_TILE,
    Int32s,
    Stretch,
    Work,
    most_cut,
    most_parts,
    stay_whole,
)
from .shares import list_shares, takes_shares
from .tiles import AHEAD, choose_tiles

LONG = 4096
"""Keys of a row from which two programs for every multiprocessor are worth a merge where there are one or two without
(32 rows on an H200: of 8,192 keys 128 us instead of 149, of 1,083 keys 24.0 instead of 23.3)."""


AT_ONCE = 3.0
"""Pieces of two blocks, per multiprocessor, up to which reading all keys of all rows, row by row, takes less time than
tiles for more than two queries (an H200, benchmarks/kernels/results/tree_decode_few_keys_h200.json; 16 rows with 256
keys of their own after 512, tree_decode_h200.md there). It reads more, but what few programs read takes no longer for
that, and products for one query are smaller, unless both have `LEAST_TILE` rows, as with one query head per group."""


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
    shares: bool = False,
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
        shares: whether a program may have several items, where many rows of unequal length share nothing.
    """
    rows, tokens = len(lengths), int(borders[-1])
    work: Work
    makes = few if rows <= few.FEW and tokens <= few.FEW_TOKENS else many
    most_items = most_cut(processors, kv_heads)
    common: list[int] | None = makes.common_keys(pages, lengths, page_size, least_shared or LEAST_SHARED)
    if rows == tokens:
        tiles = None if common is None else choose_tiles(common, lengths, sharers, least_shared)
        if tiles is not None and least_shared is None and tiles.sharers > 2 and sharers < LEAST_TILE:
            reads = -(-lengths // (2 * BLOCK)).sum() * kv_heads
            tiles = None if reads <= AT_ONCE * processors else tiles
        if tiles is None:
            if shares and takes_shares(lengths, kv_heads, processors):
                work = list_shares(pages, lengths, programs=most_items, slots=slots)
                return work._replace(room=BLOCK) if moves else work
            # Two programs for every multiprocessor hide each other's waits; where there is about one anyway, a second
            # part and the merge cost more than that, but for long rows in smaller tiles.
            alone = rows * kv_heads
            twice = alone < processors or int(lengths.sum()) >= LONG * rows
            programs = 2 * processors if twice and not stay_whole(alone, processors) else processors
            work = makes.list_alone(
                pages, lengths, kv_heads=kv_heads, programs=programs, most_items=most_items, slots=slots
            )
            return work._replace(room=BLOCK) if moves else work
        if not tiles.is_one_over_many_keys(sharers):
            work = makes.list_tiles(
                pages, lengths, tiles, page_size=page_size, kv_heads=kv_heads, programs=2 * processors,
                most_items=most_items, slots=slots, moves=moves,
            )  # fmt: skip
            return work
    # Rows of several queries need the larger tiles with and without others.
    stretches, depth = ([], 0) if common is None else _stretches(common, lengths, least_shared or LEAST_SHARED)
    if common is None or depth > slots // 2:
        stretches, depth = [Stretch(row, row + 1, 0, keys) for row, keys in enumerate(lengths.tolist())], 1
    # Places behind every row's own pages, which no item reaches before they are needed.
    lone = sum([last - first == 1 for first, last, _, _ in stretches])
    ahead = AHEAD if moves and lone == rows == tokens else 0
    work = makes.list_stretches(
        pages, lengths, borders, stretches, depth=depth, ahead=ahead, page_size=page_size, kv_heads=kv_heads,
        programs=2 * processors, slots=slots, sharers=sharers,
    )  # fmt: skip
    return work


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
    shares: bool = False,
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
        shares=shares,
    )
    if numbers[-1] + 1 == len(numbers):
        return work
    parts = np.zeros(numbers[-1] + 1, dtype=np.int32)
    parts[numbers] = work.counts
    tokens = np.where(work.tokens < 0, -1, numbers[work.tokens]).astype(np.int32)
    return work._replace(tokens=tokens, counts=parts)


def _stretches(common: list[int], lengths: Int32s, least: int) -> tuple[list[Stretch], int]:
    """Every row's keys, what neighbours share before what is each one's own; and most stretches that one row is in."""
    found: list[Stretch] = []
    ends = lengths.tolist()
    waiting, deepest = [(0, len(ends), 0, 1)], 0
    while waiting:
        # All of these rows have been equal up to `start`.
        first, last, start, depth = waiting.pop()
        if last - first == 1:
            if start < ends[first]:
                found.append(Stretch(first, last, start, ends[first]))
                deepest = max(deepest, depth)
            continue
        inner = common[first : last - 1]
        end = min(inner)
        if end - start >= least:
            found.append(Stretch(first, last, start, end))
            deepest = max(deepest, depth)
            start, depth = end, depth + 1
        # Where two neighbours share little more, the rows part.
        parts = [row for row, keys in enumerate(inner, first + 1) if keys - start < least]
        waiting += [(low, high, start, depth) for low, high in pairwise([first, *parts, last])][::-1]
    return found, deepest
