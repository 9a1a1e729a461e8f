"""The step that is being planned: rows are gathered one by one and become the arrays of a `StepPlan`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from megatron_multiverse.inference.cache.tree import Node, PageTree
from megatron_multiverse.inference.sampling_plan import Sampled, Scored, sampling_arrays, scored_arrays
from megatron_multiverse.inference.step.plan import StepPlan


class Step(NamedTuple):
    """A planned step: the integers every rank needs, and whom the tokens that come back belong to."""

    plan: StepPlan
    sampled: list[Sampled]
    """One per row of `plan.sample`."""
    scored: list[Scored]
    """Pieces of prompts, one after the other in `plan.scored`."""


@dataclass
class Draft:
    """The rows of a step, one entry each; a row is one branch with the tokens it brings."""

    nodes: list[Node] = field(default_factory=list)
    """Where the branch stands in the cache."""
    counts: list[int] = field(default_factory=list)
    """How many tokens it brings."""
    first_positions: list[int] = field(default_factory=list)
    """Position of the first of them; the others follow it."""
    ids: list[int] = field(default_factory=list)
    """The tokens of all rows, one row after the other; 0 where the step in flight will say it."""
    sources: list[tuple[int, int]] = field(default_factory=list)
    """(index in `ids`, sampled row of the step in flight) of those."""
    sample: list[int] = field(default_factory=list)
    """Rows that want a token after their last one."""
    sampled: list[Sampled] = field(default_factory=list)
    """Whom these tokens belong to."""
    draws: list[int] = field(default_factory=list)
    """Index of each of them among those its branch draws."""
    coming: list[int] = field(default_factory=list)
    """For each of them the row of the step in flight that draws the token before it; -1 where it is known."""
    scored: list[Scored] = field(default_factory=list)
    """Pieces of prompts whose log-probabilities are asked for."""

    def make_plan(self, tree: PageTree) -> StepPlan:
        """The rows as arrays. Python work is per row, never per token."""
        book = tree.book
        counts = np.array(self.counts, dtype=np.int64)
        borders = np.zeros(len(counts) + 1, dtype=np.int64)
        np.cumsum(counts, out=borders[1:])
        first = np.array(self.first_positions, dtype=np.int64)
        widest = max([node.num_pages for node in self.nodes])
        pages = np.full((len(counts), widest), book.num_pages, dtype=np.int32)
        for line, node in zip(pages, self.nodes, strict=True):
            line[: node.num_pages] = node.pages
        copies, write_slots, write_tokens = tree.take_ledger()
        sources = np.full(len(self.ids), -1, dtype=np.int64)
        for token, row in self.sources:
            sources[token] = row
        return StepPlan(
            copies=copies,
            ids=np.array(self.ids, dtype=np.int64),
            sources=sources,
            positions=np.repeat(first - borders[:-1], counts) + np.arange(borders[-1]),
            borders=borders,
            pages=pages,
            lengths=np.array([node.length for node in self.nodes], dtype=np.int32),
            write_slots=write_slots,
            write_tokens=write_tokens,
            sample=np.array(self.sample, dtype=np.int64),
            sampling=sampling_arrays(self.sampled, self.draws, self.coming),
            **scored_arrays(self.scored),
            freed=np.array(book.take_freed() if book.freed else (), dtype=np.int64),
        )
