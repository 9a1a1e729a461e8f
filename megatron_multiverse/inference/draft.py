"""The step that is being planned: branches are fed one by one, and their rows become the arrays of a `StepPlan`.

Most steps differ from the one before only in that every row goes on by a token. `follow_up` makes such a step from the
arrays of that one, and `Draft` makes any step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from megatron_multiverse.inference.cache.tree import Node, PageTree
from megatron_multiverse.inference.sampling_plan import NO_SCORES, Sampled, Scored, scored_arrays, shaping_arrays
from megatron_multiverse.inference.step.plan import Ints, SamplingArrays, StepPlan
from megatron_multiverse.inference.text.branch import Branch
from megatron_multiverse.inference.text.guide import Guide
from megatron_multiverse.inference.text.state import RequestState


class Step(NamedTuple):
    """A planned step: the integers every rank needs, and whom the tokens that come back belong to."""

    plan: StepPlan
    sampled: list[Sampled]
    """One per row of `plan.sample`."""
    scored: list[Scored]
    """Pieces of prompts, one after the other in `plan.scored`."""
    nodes: list[Node]
    """Where the branch of each row stands in the cache."""
    lines: Ints
    """[rows], theirs in the table of pages."""
    guides: Sequence[Guide] = ()
    """Of the branches that draw, where their answers have grammars."""

    @property
    def only_draws(self) -> bool:
        """Whether each row brings one token, which goes to one slot, and draws the next."""
        rows = np.arange(len(self.sampled))
        return len(rows) == len(self.plan.ids) and np.array_equal(self.plan.write_tokens, rows)


class Draft:
    """The rows of a step; a row is one branch with the tokens it brings.

    Args:
        tree: makes room for the tokens.
        in_flight: the step whose tokens are still to come; they are taken from the device then.
        max_rows: most rows.
        token_room: most tokens of rows that bring more than one; any row may bring one.
        row_room: most rows of each request; None for no limit.
    """

    def __init__(
        self,
        tree: PageTree,
        *,
        in_flight: Step | None,
        max_rows: int,
        token_room: int,
        row_room: dict[RequestState, int] | None = None,
    ) -> None:
        self.tree = tree
        sampled = [] if in_flight is None else in_flight.sampled
        self._coming = {branch: (row, length) for row, (_, branch, length) in enumerate(sampled)}
        self._uncounted = int(in_flight is not None)  # steps before this one that `RequestState.step` does not have yet
        self.max_rows = max_rows
        self.token_room = token_room
        """What is left of it."""
        self.row_room = row_room
        """What is left of it."""
        self.pages_short = False
        """Whether something that runs waits for pages."""
        self.left_out = False
        """Whether a branch found no row."""
        self.nodes: list[Node] = []
        """Where the branch of each row stands in the cache."""
        self._borders = [0]  # after each row, how many tokens the rows bring so far
        self._ids: list[int] = []  # the tokens, as the tree numbers them; 0 where the step in flight will say it
        self._positions: list[int] = []  # theirs
        self._sources: list[tuple[int, int]] = []  # of those: (index in `_ids`, sampled row of the step in flight)
        self._sample: list[int] = []  # rows that want a token after their last one
        self._sampled: list[Sampled] = []  # whom these tokens belong to
        self._scored: list[Scored] = []  # pieces of prompts whose log-probabilities are asked for

    @property
    def rows_left(self) -> int:
        """Rows that may still enter."""
        return self.max_rows - len(self.nodes)

    def feed(self, state: RequestState, branch: Branch, node: Node, most: int | None = None) -> None:
        """Put a branch into the step with its next tokens, as many as fit or as `most` says; leave it out if there is
        no row for it, or no page."""
        known, start = len(branch.ids), branch.fed
        all_joined = branch.num_joined == len(branch.blocks)
        coming = self._coming_row(branch) if self._coming else -1
        end = known + (coming >= 0) if all_joined else branch.feed_end
        if start == end:
            return
        row_room = self.row_room
        if len(self.nodes) >= self.max_rows or (row_room is not None and row_room[state] < 1):
            self.left_out = True
            if coming < 0:
                state.end_span(branch, state.step + self._uncounted)
            return
        count = end - start
        if count > 1:  # one token always enters
            count = most or min(count, max(1, self.token_room))
        if not self.tree.append(node, count):
            self.pages_short = True
            return
        if count > 1:
            self.token_room -= count
        if row_room is not None:
            row_room[state] -= 1
        branch.fed = fed = start + count
        if fed == end and all_joined and branch.finish is None:
            self._sample.append(len(self.nodes))
            self._sampled.append((state, branch, end))
            if branch.span_start is None:
                branch.span_start = (state.step + self._uncounted, end)  # the timeline shows it from here
        if state.scores is not None and state.scores_prompt and start + 1 < branch.prompt_length:
            last = min(fed, branch.prompt_length - 1)
            self._scored.append(Scored(state, len(self._ids), start, last - start))
        self.nodes.append(node)
        if start < known:
            self._ids += branch.ids[start:fed]
            self._positions += branch.positions[start:fed]
        else:
            assert coming >= 0, "the step in flight draws what is fed before it is known"
            self._sources.append((len(self._ids), coming))
            self._ids.append(0)
            self._positions.append(branch.next_position)
        self._borders.append(len(self._ids))

    def begin_like(self, branch: Branch, node: Node, first: Branch, first_node: Node) -> None:
        """What a path that is not fed yet begins with like a sibling, as far as that one is fed, is computed only
        there: the same tokens at the same positions after the same text have the same keys."""
        most = min(first.fed, branch.feed_end - 1)  # its last token is fed, to draw the next one
        alike = 0
        while (
            alike < most and branch.ids[alike] == first.ids[alike] and branch.positions[alike] == first.positions[alike]
        ):
            alike += 1
        if alike and self.tree.append_like(node, first_node, alike):
            branch.fed = alike

    def _coming_row(self, branch: Branch) -> int:
        """The row of the step in flight that draws the next token of a branch; -1 if none does."""
        row, length = self._coming.get(branch, (-1, -1))
        # It was fed less if it has stepped back since, and begins again.
        return row if branch.fed == length and branch.goes_on_after(length) else -1

    def finish(self) -> Step:
        """The rows as arrays."""
        tree, book, nodes = self.tree, self.tree.book, self.nodes
        lines = np.array([node.line for node in nodes])
        copies, write_slots, write_tokens = tree.take_ledger()
        sources = np.full(len(self._ids), -1, dtype=np.int64)
        for token, row in self._sources:
            sources[token] = row
        plan = StepPlan(
            copies=copies,
            ids=np.array(self._ids, dtype=np.int64),
            sources=sources,
            positions=np.array(self._positions, dtype=np.int64),
            borders=np.array(self._borders, dtype=np.int64),
            pages=tree.table.gather(lines, max([node.num_pages for node in nodes])),
            lengths=np.array([node.length for node in nodes], dtype=np.int32),
            write_slots=write_slots,
            write_tokens=write_tokens,
            sample=np.array(self._sample, dtype=np.int64),
            sampling=self._sampling(),
            **(scored_arrays(self._scored) if self._scored else NO_SCORES),
            freed=np.array(book.take_freed() if book.freed else (), dtype=np.int64),
        )
        guides = [branch.guide for _, branch, _ in self._sampled if branch.guide is not None]
        return Step(plan, self._sampled, self._scored, nodes, lines, guides)

    def _sampling(self) -> SamplingArrays:
        """How each row that wants a token draws it."""
        sampled = self._sampled
        params = [state.request.sampling for state, _, _ in sampled]
        return SamplingArrays(
            keys=np.array([branch.key for _, branch, _ in sampled], dtype=np.int64),
            indices=np.array([b.num_sampled + length - len(b.ids) for _, b, length in sampled], dtype=np.int64),
            temperature=np.array([p.temperature for p in params], dtype=np.float64),
            shaping=shaping_arrays(sampled, self._coming) if any(p.is_shaped or p.min_tokens for p in params) else None,
        )


def follow_up(last: Step, tree: PageTree, *, in_flight: bool) -> Step | None:
    """The step after one that only draws, if every row just goes on by a token; None, and nothing, if one does not.

    Equal to what a `Draft` of these rows comes to.

    Args:
        last: the step planned before this one.
        tree: makes room for the tokens; nothing else is noted for the pass.
        in_flight: whether the tokens that `last` draws are still to come.
    """
    new = 0 if in_flight else 1  # tokens that its branches have written since
    for _, branch, length in last.sampled:
        if (
            branch.fed != length
            or len(branch.ids) != length + new
            or branch.finish is not None
            or branch.num_joined != len(branch.blocks)
        ):
            return None
    plan, book = last.plan, tree.book
    write_slots = tree.append_one_each(last.nodes, plan.write_slots)
    if write_slots is None:
        return None
    sampled = [(state, branch, length + 1) for state, branch, length in last.sampled]
    for _, branch, length in sampled:
        branch.fed = length
    shaping = None
    if plan.sampling.shaping:
        # Rows that ask for nothing ask for nothing later: the ban of `min_tokens` only ever ends.
        coming = {branch: (row, length) for row, (_, branch, length) in enumerate(last.sampled)} if in_flight else {}
        shaping = shaping_arrays(sampled, coming)
    freed = np.array(book.take_freed(), dtype=np.int64) if book.freed else None
    following = plan.moved_on(shaping, freed)
    if not (write_slots % tree.page_size).all():
        width = -(-int(following.lengths.max()) // tree.page_size)
        pages = tree.table.gather(last.lines, width)
        following = replace(following, pages=pages, write_slots=write_slots, moved_from=None)
    if not in_flight:
        ids = np.array([branch.ids[-1] for _, branch, _ in sampled])
        following = replace(following, ids=ids, sources=np.full_like(plan.sample, -1), moved_from=None)
    return Step(following, sampled, [], last.nodes, last.lines, last.guides)
