"""What all lists of work are made of: tables of pages, and stretches of keys cut into pieces of about one size."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

BLOCK = 64
"""Keys a program looks at at once; pieces are multiples of it."""
LEAST_SHARED = 4 * BLOCK
"""Shared keys below which rows are never looked at together."""
LEAST_TILE, SHARERS = 16, 8
"""Rows of the tensor cores' smallest tile, and queries for whose heads tiles are made; see `most_sharers`."""

WHOLE = 0.73, 0.975
"""Rows that share nothing are not cut where they make between so many programs for each multiprocessor, and have tiles
of many keys (`triton_decode`). 32 rows of 28 heads over 4 take 22.1 us instead of 24.9 for 1,083 keys and 125 instead
of 140 for 8,192; 18 rows, cut in two, 37.7 instead of 26.9 for 2,048 (an H200, decode_tiles_h200.md). With 132
multiprocessors a graph's rows (`GraphSizes`), by which its tiles are chosen, and those of a step that it runs are both
within these bounds or neither."""

Int32s = npt.NDArray[np.int32]
Ints = npt.NDArray[np.int64]

NO_SHARES = np.zeros(0, dtype=np.int32)
"""Every program has one item."""


class Work(NamedTuple):
    """The list for `triton_decode.tree_decode_triton`.

    Where an item has one query, that sees the keys of a row up to its limit. Where it may have several, its keys are
    those that they share and then each one's own: a query sees the keys below the first number of its tail, and those
    from the second to its limit.
    """

    items: Int32s
    """[items, 4]: where in `pages` the page of key 0 would stand, first key, end of the keys, and which part of its
    query this is, where items have one. A stretch from 0 to 0 is padding."""
    tokens: Int32s
    """[items, sharers], the queries; -1 is none."""
    limits: Int32s
    """[items, sharers], the end of the keys that each query sees."""
    tails: Int32s
    """[items, 3, sharers], where items may have several queries: the end of the keys that they share, the begin of each
    one's own, and which part of the query this is. Else [0, 3, 1]."""
    counts: Int32s
    """[tokens], parts of each query."""
    pages: Int32s
    """Flat: the pages of every stretch, one after the other; where items may have several queries, the last slot that
    may be read of each, page * page size + offset. -1 keeps a place for a page: no slot of it is read."""
    slots: int
    """Most parts a query may have; 1 if all have one, so that nothing is to be merged."""
    ends: Ints | None = None
    """[rows], where in `pages` the last page of each row stands, if the last slot to be read there is that of its last
    key; None where items end with their rows, so that all of a page may be read."""
    room: int = 0
    """Keys that every row may have further before the list is to be made anew: where rows share keys, before a next
    page has no place in `pages`; else before the last items of rows have become much longer than others."""
    shares: Int32s = NO_SHARES
    """[programs + 1], where in `items` those of each program begin, if a program has several, one after the other, see
    `shares.py`; empty if it has one."""


class Moves(NamedTuple):
    """What of a list changes when each row has a key more, in the page where its last one is: the limit of every query,
    and the following."""

    at_end: Int32s
    """[items], 1 for an item that ends where its row does, so that it reaches a key further."""
    ends: Int32s
    """[rows], where in `Work.pages` the last page of each row stands, of which one more slot may be read; [0] where
    pages stand there without their last slots."""


class Stretch(NamedTuple):
    """Keys [start, end) of the rows [first, last), which list the same pages for them."""

    first: int
    last: int
    start: int
    end: int


NO_MOVES = Moves(np.zeros(0, dtype=np.int32), np.zeros(0, dtype=np.int32))
"""Nothing changes."""
NO_TAILS = np.zeros((0, 3, 1), dtype=np.int32)
NO_WORK = Work(
    items=np.zeros((0, 4), dtype=np.int32),
    tokens=np.zeros((0, 1), dtype=np.int32),
    limits=np.zeros((0, 1), dtype=np.int32),
    tails=NO_TAILS,
    counts=np.zeros(0, dtype=np.int32),
    pages=np.zeros(0, dtype=np.int32),
    slots=1,
)
"""For no queries."""


def with_sharers(work: Work, sharers: int, page_size: int) -> Work:
    """The same list with room for `sharers` queries in every item."""
    items, width = work.tokens.shape
    if width == sharers:
        return work
    room = ((0, 0), (0, sharers - width))
    tails, pages = work.tails, work.pages
    if width == 1:
        tails = np.zeros((items, 3, 1), dtype=np.int32)
        tails[:, 2, 0] = work.items[:, 3]
        pages = pages * np.int32(page_size) + np.int32(page_size - 1)  # items end where their rows do
    return work._replace(
        tokens=np.pad(work.tokens, room, constant_values=-1),
        limits=np.pad(work.limits, room),
        tails=np.pad(tails, ((0, 0), *room)),
        pages=pages,
    )


def most_parts(queries: int) -> int:
    """Parts a query may have in a step of `queries`: many where few queries must keep the whole GPU busy."""
    return 8 if queries > 64 else max(16, min(64, 512 // queries))


def most_cut(processors: int, kv_heads: int) -> int:
    """Items into which rows are cut that would be fewer: two programs for every multiprocessor."""
    return max(2 * processors // kv_heads, 1)


def stay_whole(programs: int, processors: int) -> bool:
    """Whether rows that share nothing and make so many programs, a row and key/value head each, are left whole."""
    least, most = WHOLE
    return least * processors < programs < most * processors


def most_sharers(heads: int, kv_heads: int) -> int:
    """Queries that may share an item, with so many query heads over so many key/value heads: as many as the tile for
    the heads of eight has rows for."""
    rows = max(LEAST_TILE, 1 << (SHARERS * heads // kv_heads - 1).bit_length())
    return rows * kv_heads // heads


def counted(counts: Ints) -> tuple[Ints, Ints]:
    """For as many things of each owner as `counts` says: [sum], whose each one is, and its number among the owner's."""
    owner = np.repeat(np.arange(len(counts)), counts)
    return owner, np.arange(len(owner)) - (np.cumsum(counts) - counts)[owner]


def page_tables(pages: Int32s, stretches: Ints, page_size: int, ahead: Ints | None = None) -> tuple[Int32s, Ints]:
    """The pages of the stretches, flat, and where among them the page of each one's key 0 would stand.

    Behind a stretch's pages stands -1 for those that it needs for so many keys more as `ahead` says, [stretches].
    """
    begins = stretches[:, 2] // page_size
    used = counts = -(-stretches[:, 3] // page_size) - begins
    if ahead is not None:
        counts = -(-(stretches[:, 3] + ahead) // page_size) - begins
    owner, index = counted(counts)
    there = (stretches[:, 0] * pages.shape[1] + begins)[owner] + index
    bases = np.cumsum(counts) - counts - begins
    if ahead is None:
        return pages.reshape(-1)[there], bases
    # What stands behind a row's pages is another's, and behind the last row's nothing.
    numbers = pages.reshape(-1)[np.minimum(there, pages.size - 1)]
    owner, index = counted(counts - used)
    numbers[(bases + begins + used)[owner] + index] = -1
    return numbers, bases


def piece_of(sizes: npt.NDArray[np.signedinteger], longest: int, kv_heads: int, programs: int, most: int) -> int:
    """Keys of an item, for about so many programs, but no more than `most` parts for a query.

    Where few rows leave multiprocessors idle, that is a block: with two blocks a step of Qwen2.5-1.5B alone takes 2 %
    longer (benchmarks/results/decode_tiles_h200.md).
    """
    even = -(-int(sizes.sum()) * kv_heads // programs)
    return -(-max(even, -(-longest // most), 1) // BLOCK) * BLOCK


def even_pieces(sizes: npt.NDArray[np.signedinteger], piece: int) -> npt.NDArray[np.signedinteger]:
    """Keys per item of each stretch: about `piece`, but so that the last one is not a small rest."""
    parts = np.maximum((sizes + piece // 2) // piece, 1)
    return -(-sizes // (parts * BLOCK)) * BLOCK


def cut_evenly(
    sizes: npt.NDArray[np.signedinteger], piece: int, most: int
) -> tuple[npt.NDArray[np.signedinteger], npt.NDArray[np.signedinteger]]:
    """Keys per item and items of each stretch, cut into about `piece` keys, but into no more than `most` items where
    there are fewer stretches: what cannot run at once would leave a rest that runs alone."""
    most = max(most, len(sizes))
    while True:
        each = even_pieces(sizes, piece)
        counts = -(-sizes // each)
        if int(counts.sum()) <= most:
            return each, counts
        piece += -(-piece // (8 * BLOCK)) * BLOCK
