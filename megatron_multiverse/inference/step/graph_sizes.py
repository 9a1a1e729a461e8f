"""Which CUDA graph a step fits: how many tokens, rows, keys it has room for. Needs no GPU."""

from __future__ import annotations

import bisect
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from megatron_multiverse.inference.step.plan import StepPlan
from megatron_multiverse.kernels.tree_decode import (
    NO_WORK,
    SEGMENT,
    Moves,
    Segments,
    SuccessiveWork,
    Work,
    cut_segments,
    divide_rows,
    most_cut,
    most_parts,
    most_sharers,
    prompt_rows,
    with_sharers,
)

SIZES = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
"""Tokens of the graphs; a step takes the next larger one."""
PROMPT_SIZES = (192, 256, 320, 384, 448, 512, 640, 768, 896, 1024, 1280, 1536, 1792, 2048, 2176, 2560, 3072, 3584, 4096)
"""The same where prompts are read, so many tokens that each counts. 2,176: as many as come at once by default, and 128
rows beside them."""
ROWS = (64, 512)
"""Rows that such a graph draws for, and its first tokens, among which all those stand that are not of prompts."""
KEYS = (8192, 65536)
"""Keys that the prompts of such a graph see. Few sizes, since each needs graphs of its own, for as many as there are of
tokens; so there is one list of work beside prompts, too, which has room for whatever rows share."""
SHORT_SEGMENTS = 64
"""Segments of such a graph beyond those that are full."""
MOST_SEEN = 1 << 24
"""Keys that its prompts see, added up over their tokens. FlashAttention 4, which no graph has, wins beyond."""
MOST_PRODUCTS = 8 * 10**12
"""Weights times tokens of such a graph. A GPU multiplies more for longer than the host takes to launch the calls."""
MOST_MIXED, MOST_LISTED = 128, 1 << 18
"""A step of no more tokens than the first attends by the list of work alone. So does one of up to 512 whose prompts see
no more keys than the second, added up over their tokens."""


@dataclass(frozen=True)
class Kind:
    """What a graph is made for."""

    size: int
    """Tokens."""
    rows: int
    """See `ROWS`; as many as tokens if there are no prompts."""
    items: int
    """Of the list of work; 0 if all rows are of prompts."""
    sharers: int
    """Queries per item."""
    slots: int
    """Parts per query."""
    keys: int
    """See `KEYS`; 0 if no prompts are read."""
    draw: str
    """greedy, noise, or logits: the caller draws."""
    programs: int = 0
    """Of attention, if each has several items, see `tree_decode.Work.shares`; 0: each has one."""

    @property
    def segments(self) -> int:
        """Segments of prompts that it has room for."""
        return self.size // SEGMENT + SHORT_SEGMENTS if self.keys else 0

    @property
    def pages(self) -> int:
        """Pages of the list that it has room for, those that rows share counted once: each row has room for 65,536 keys
        of pages of 16, and few rows together for a million; beside prompts, where there are many graphs, all rows
        together for four millions."""
        most = max(4096 * self.rows, 1 << 16)
        return min(most, 1 << 18) if self.keys else most

    @property
    def writes(self) -> int:
        """Slots that its steps may write: some tokens are written to several, most where paths begin."""
        return self.size + min(2 * self.size, 1024) + 16


class Fit(NamedTuple):
    """A graph for a step, and what that attends to."""

    kind: Kind
    work: Work
    segments: Segments | None
    moves: Moves | None = None
    """What the GPU needs to know to move the list on; None if it cannot be."""


def room_for_items(work: Work, rows: int, processors: int, kv_heads: int) -> int | None:
    """Items that a graph of `rows` rows has room for, of those graphs that this list fits; None: it fits none.

    What stands behind the list is padding, for which programs start that do nothing. Most lists need none: rows that
    are not cut have an item each, those that are cut no more together than keep the GPU busy, and most tiles have two
    rows or more.
    """
    busy = most_cut(processors, kv_heads)
    if len(work.shares):
        rooms = [rows + busy]
    elif work.tokens.shape[1] > 1:
        rooms = [max(rows // 2, busy), max(rows, busy), 3 * rows + busy]
    else:
        rooms = [rows if work.slots == 1 else max(rows, busy), 3 * rows + busy]
    return next((room for room in rooms if room >= len(work.items)), None)


def _next(sizes: tuple[int, ...], least: int) -> int | None:
    index = bisect.bisect_left(sizes, least)
    return sizes[index] if index < len(sizes) else None


class GraphSizes:
    """Finds the smallest graph for a step.

    Args:
        page_size: keys per page.
        heads: query heads.
        kv_heads: key/value heads.
        processors: multiprocessors of the GPU.
        weights: of all products of a token.
        segments: FlashAttention 2 takes the queries.
    """

    def __init__(
        self, *, page_size: int, heads: int, kv_heads: int, processors: int, weights: int, segments: bool
    ) -> None:
        self.page_size, self.kv_heads, self.processors = page_size, kv_heads, processors
        self.sharers = most_sharers(heads, kv_heads)
        self.most_prompt_tokens = MOST_PRODUCTS // weights if segments else 0
        self._last: tuple[Kind | None, object] = None, None  # the last graph without prompts, and its list's queries
        self.work = SuccessiveWork(page_size=page_size, kv_heads=kv_heads, processors=processors, sharers=self.sharers)

    def fit(self, plan: StepPlan, draw: str) -> Fit | None:
        """The smallest graph for a step that draws so (`Kind.draw`); None: it runs without."""
        tokens = len(plan.ids)
        if tokens > MOST_MIXED and tokens > len(plan.lengths):
            prompts = prompt_rows(plan.borders)
            seen = int((np.diff(plan.borders) * plan.lengths.astype(np.int64))[prompts].sum())
            if seen > MOST_LISTED or (seen and tokens > SIZES[-1]):
                return self._with_prompts(plan, draw, prompts) if seen <= MOST_SEEN else None
        size = _next(SIZES, tokens)
        if size is None:
            return None
        work = self.work.divide(plan.pages, plan.lengths, plan.borders, most_parts(size))
        kind, last = self._last
        if work.tokens is not last or kind is None or (kind.size, kind.draw) != (size, draw):
            # Else the list was moved on, so that the graph is that of the step before.
            items = room_for_items(work, size, self.processors, self.kv_heads)
            programs, sharers = max(len(work.shares) - 1, 0), work.tokens.shape[1]
            kind = None if items is None else Kind(size, size, items, sharers, work.slots, 0, draw, programs)
            self._last = kind, work.tokens
        return None if kind is None else _fitting(plan, kind, work, None, self.work.moves)

    def _with_prompts(self, plan: StepPlan, draw: str, prompts: npt.NDArray[np.bool_]) -> Fit | None:
        """A graph in which FlashAttention reads the prompts."""
        size = _next(PROMPT_SIZES, len(plan.ids))
        keys = _next(KEYS, int(plan.lengths[prompts].sum()))
        rows = _next(ROWS, max(len(plan.sample), int(plan.borders[1:][~prompts].max(initial=0))))
        if size is None or size > self.most_prompt_tokens or keys is None or rows is None:
            return None
        segments = cut_segments(plan.pages, plan.lengths, plan.borders, prompts, self.page_size)
        work = NO_WORK
        if not prompts.all():
            work = divide_rows(
                plan.pages,
                plan.lengths,
                plan.borders,
                ~prompts,
                page_size=self.page_size,
                kv_heads=self.kv_heads,
                processors=self.processors,
                sharers=self.sharers,
                slots=most_parts(rows),
            )
        work = with_sharers(work, self.sharers, self.page_size)._replace(slots=most_parts(rows))
        rows = min(rows, size)
        items = 3 * rows + most_cut(self.processors, self.kv_heads) if len(work.items) else 0
        return _fitting(plan, Kind(size, rows, items, self.sharers, work.slots, keys, draw), work, segments)


def _fitting(
    plan: StepPlan, kind: Kind, work: Work, segments: Segments | None, moves: Moves | None = None
) -> Fit | None:
    """The graph, if it has room for all that."""
    if len(plan.write_slots) > kind.writes:
        return None
    if len(work.items) > kind.items or work.pages.size > kind.pages:
        return None
    return None if segments is not None and len(segments.seen) > kind.segments else Fit(kind, work, segments, moves)
