"""Who is fed in the next step: continuous batching with branches as rows. Reads text and writes none; the counters
of what is fed and joined (`Branch.fed`, `Branch.num_joined`, `Block.started`) move here, ahead of the pass.

Each step is planned in this order, over requests first come first served:

1. every branch that has written more than the cache has seen brings its next tokens (a page that is not there makes it
   wait, nothing else);
2. joins: where the last token of the last path is fed, the parent takes over the pages of its paths and goes on, in
   this very step;
3. forks: where `</Goal>` is fed, the paths start in this very step; all at once if they can ever run at once, else in
   waves as rows come free;
4. new requests, unless something that already runs waits for pages, or a fork for rows.

A branch is fed only up to `Block.at` of its next block, until that block is joined in the cache. Text and cache fork
and join at different times: the text when a token is committed, the cache here, when that token is fed. If nothing can
run, `preemption.py` decides who steps back.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from megatron_multiverse.inference.cache.book import PageBook
from megatron_multiverse.inference.cache.prefix import PrefixCache
from megatron_multiverse.inference.cache.tree import Node, PageTree
from megatron_multiverse.inference.sampling_plan import Sampled, sampling_arrays
from megatron_multiverse.inference.step.plan import StepPlan
from megatron_multiverse.inference.text.branch import Awaited, Block, Branch
from megatron_multiverse.inference.text.state import RequestState


class Step(NamedTuple):
    """A planned step: the integers every rank needs, and whom the tokens that come back belong to."""

    plan: StepPlan
    sampled: list[Sampled]
    """One per row of `plan.sample`."""


@dataclass
class Draft:
    """The rows of the step that is being planned, one entry each; a row is one branch with the tokens it brings."""

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


class Scheduler:
    """Plans steps.

    Args:
        book: the pages.
        max_rows: most branches per step.
        max_step_tokens: most tokens per step beyond one per row; longer prompts are fed in chunks.
        prefix_pages: pages of prompts kept for later requests that begin alike.
    """

    def __init__(self, book: PageBook, *, max_rows: int, max_step_tokens: int, prefix_pages: int = 0) -> None:
        self.book = book
        self.prefixes = PrefixCache(book, prefix_pages)
        self.tree = PageTree(book)
        self.max_rows = max_rows
        self.max_step_tokens = max_step_tokens
        self.waiting: deque[RequestState] = deque()
        self.active: list[RequestState] = []
        self.nodes: dict[Branch, Node] = {}
        """Each branch's node in the cache. Branches that have not started, or were joined into their parent, have
        none."""
        self.planned = 0
        """Number of the step planned last."""
        self.in_flight = False
        """Whether that step's tokens are still to come; the next one then takes them from the device."""
        self._draft = Draft()
        self._chunk_room = 0  # tokens that may still enter the step
        self._free_rows = 0  # rows of the next step that no branch with a node will need
        self._held = False  # something waits for pages or rows: admit nothing new
        self._pages_short = False  # something waits for pages: the prompts kept for later go
        self._with_blocks: list[RequestState] = []  # requests with a block that has yet to fork or join in the cache
        self._joined: list[Node] = []  # their pages come free once the step is planned

    def plan(self) -> Step | None:
        """The next step; None if nothing can run (or nothing is left to do)."""
        while True:
            self._begin_step()
            for state in self._with_blocks:
                self._join(state)
                self._start_paths(state, force=False)
            if not self._held:
                self._admit()
            pages_came_free = False
            if not self._draft.nodes:
                # Nothing fits at once: let single paths join or start, oldest request first.
                for state in self._with_blocks:
                    pages_came_free |= self._join_one_by_one(state)
                    self._join(state)
                    self._start_paths(state, force=True)
            step = self._make_step() if self._draft.nodes else None
            for node in self._joined:
                self.tree.free(node)
            if step is not None or not (self._joined or pages_came_free):
                return step

    def _begin_step(self) -> None:
        """Feed every branch that has something to feed, and count the rows that are left."""
        if self._pages_short:
            self.prefixes.clear()  # what runs needs the pages more
        self._draft = Draft()
        self._free_rows, self._chunk_room = self.max_rows, self.max_step_tokens
        self._held = self._pages_short = False
        self._with_blocks, self._joined = [], []
        for state in self.active:
            if not state.prompt_kept:
                self._keep_prompt(state)
            plain = True
            for branch in state.live:
                self._feed(state, branch)
                if branch.finish is None and branch.num_joined == len(branch.blocks):
                    self._free_rows -= 1  # it decodes, and needs a row again next time
                else:
                    self._free_rows -= holds_row(branch)
                    plain = False
            if not plain:
                state.live = [branch for branch in state.live if not is_fed(branch)]
                self._with_blocks.append(state)

    def _keep_prompt(self, state: RequestState) -> None:
        """Offer a prompt to the prefix cache once the step that computes its keys has run."""
        if not state.prompt_kept and state.root.fed >= state.root.prompt_length:
            state.prompt_kept = True
            self.prefixes.add(state.request.prompt_ids, self.nodes[state.root].pages)

    def _feed(self, state: RequestState, branch: Branch) -> None:
        """Put the branch into the step with as many of its next tokens as fit; with none if pages are missing."""
        all_joined = branch.num_joined == len(branch.blocks)
        known = len(branch.ids)
        ahead = self.in_flight and branch.awaits is not None and self._is_coming(branch, branch.awaits)
        start, end = branch.fed, known + ahead if all_joined else feed_end(branch)
        draft = self._draft
        if start == end or len(draft.nodes) >= self.max_rows:
            return
        node = self.nodes[branch]
        count = end - start
        if count > 1:  # one token always enters
            count = min(count, max(1, self._chunk_room))
        if not self.tree.append(node, count):
            self._held = self._pages_short = True
            return
        self._chunk_room -= count
        branch.fed += count
        if all_joined and branch.finish is None and branch.fed == end:
            draft.sample.append(len(draft.nodes))
            draft.sampled.append(Sampled(state, branch, end))
            draft.draws.append(branch.num_sampled + ahead)
            draft.coming.append(branch.awaits.row if ahead and branch.awaits is not None else -1)
            if branch.span_start is None:
                branch.span_start = (state.step + self.in_flight, end)  # the timeline shows it from here
        draft.nodes.append(node)
        draft.counts.append(count)
        if start < known:
            draft.first_positions.append(branch.positions[start])
            draft.ids += branch.ids[start : start + count]
        else:  # the token that the step in flight draws
            assert branch.awaits is not None
            draft.first_positions.append(branch.next_position)
            draft.sources.append((len(draft.ids), branch.awaits.row))
            draft.ids.append(0)

    def _place(self, state: RequestState, branch: Branch, node: Node) -> None:
        """A branch gets a place in the cache and a row."""
        self.nodes[branch] = node
        state.live.append(branch)
        self._free_rows -= 1
        self._feed(state, branch)

    def _join(self, state: RequestState) -> None:
        """Every parent whose paths are fed to the end takes their pages over and goes on."""
        for branch in list(state.live):
            block = block_to_join(branch)
            if block is None or self._free_rows < 1:
                continue
            kids = [self.nodes[kid] for kid in block.kids if kid in self.nodes]
            if kids:
                node = self.nodes[branch]
                if self.tree.join_cost(node, kids) > len(self.book.free):
                    self._held = self._pages_short = True
                    continue
                self.tree.join(node, kids)
                self._joined += kids  # this step may still compute their last tokens, over their own pages
            for kid in block.kids:
                self.nodes.pop(kid, None)
            branch.num_joined += 1
            self._free_rows -= 1
            self._feed(state, branch)

    def _join_one_by_one(self, state: RequestState) -> bool:
        """The way out when no row can run: each path that joins frees its pages for the next. Whether any did."""
        pages_came_free = False
        for branch in state.live:
            block = block_to_join(branch)
            for kid in block.kids if block is not None else ():
                node = self.nodes.get(kid)
                if node is not None and self.tree.join_cost(self.nodes[branch], [node]) <= len(self.book.free):
                    self.tree.join(self.nodes[branch], [node])
                    self.tree.free(self.nodes.pop(kid))
                    pages_came_free = True
        return pages_came_free

    def _start_paths(self, state: RequestState, *, force: bool) -> None:
        """Start the paths that can start. Without `force`, a block whose paths fit into the row limit starts all
        of them together or none."""
        limit = min(self.max_rows, state.request.sampling.max_concurrent_branches or self.max_rows)
        for branch in reversed(list(state.live)):  # inner branches started later, so their paths go first
            block = cache_block(branch)
            if block is None or branch.fed < block.at or block.started == len(block.kids):
                continue
            free = min(self._free_rows, limit - sum(map(holds_row, state.live)))
            left = len(block.kids) - block.started
            at_once = not force and block.started == 0 and left <= limit
            count = self._affordable(self.nodes[branch], block, min(left, free))
            self._pages_short |= count < min(left, free)
            if count < (left if at_once else 1):
                self._held = self._held or at_once or free > 0
                continue
            kids = block.kids[block.started : block.started + count]
            block.started += count
            for kid, node in zip(kids, self.tree.fork(self.nodes[branch], count), strict=True):
                self._place(state, kid, node)

    def _affordable(self, node: Node, block: Block, count: int) -> int:
        """How many of the next `count` paths the free pages hold, each with the tokens it would bring first."""
        open_slots = node.length % self.book.page_size
        pages = 0
        for k, kid in enumerate(block.kids[block.started : block.started + max(count, 0)]):
            first = min(feed_end(kid), self.max_step_tokens)
            pages += -(-(open_slots + first) // self.book.page_size)
            if pages > len(self.book.free):
                return k
        return max(count, 0)

    def _admit(self) -> None:
        """Start the requests that wait, in their order, while rows and pages are free."""
        while self.waiting and self._free_rows > 0:
            state = self.waiting[0]
            need = max(-(-(state.root.prompt_length + 1) // self.book.page_size), state.pages_wanted)
            if self.active and need + self._promised() > len(self.book.free):
                self._held = self._pages_short = True
                return
            self.active.append(self.waiting.popleft())
            node = Node()
            if known := self.prefixes.find(state.request.prompt_ids):
                self.tree.share(node, known)
                state.root.fed = node.length
            if state.preemptions == 0:
                state.cached_tokens = node.length
            self._place(state, state.root, node)

    def _promised(self) -> int:
        """Pages that admitted prompts still need."""
        return sum(
            self.tree.append_cost(self.nodes[state.root], state.root.prompt_length - state.root.fed)
            for state in self.active
            if state.root.fed < state.root.prompt_length
        )

    def _make_step(self) -> Step:
        """The draft as arrays. Python work is per row, never per token."""
        draft = self._draft
        counts = np.array(draft.counts, dtype=np.int64)
        borders = np.zeros(len(counts) + 1, dtype=np.int64)
        np.cumsum(counts, out=borders[1:])
        first = np.array(draft.first_positions, dtype=np.int64)
        widest = max([node.num_pages for node in draft.nodes])
        pages = np.full((len(counts), widest), self.book.num_pages, dtype=np.int32)
        for line, node in zip(pages, draft.nodes, strict=True):
            line[: node.num_pages] = node.pages
        copies, write_slots, write_tokens = self.tree.take_ledger()
        sources = np.full(len(draft.ids), -1, dtype=np.int64)
        for token, row in draft.sources:
            sources[token] = row
        self.planned += 1
        for row, (_, branch, length) in enumerate(draft.sampled):
            branch.awaits = Awaited(self.planned, row, length)
        plan = StepPlan(
            copies=copies,
            ids=np.array(draft.ids, dtype=np.int64),
            sources=sources,
            positions=np.repeat(first - borders[:-1], counts) + np.arange(borders[-1]),
            borders=borders,
            pages=pages,
            lengths=np.array([node.length for node in draft.nodes], dtype=np.int32),
            write_slots=write_slots,
            write_tokens=write_tokens,
            sample=np.array(draft.sample, dtype=np.int64),
            sampling=sampling_arrays(draft.sampled, draft.draws, draft.coming),
            freed=np.array(self.book.take_freed() if self.book.freed else (), dtype=np.int64),
        )
        return Step(plan, draft.sampled)

    def remove(self, state: RequestState) -> None:
        """Give back everything the request holds in the cache; its text stays."""
        if state in self.waiting:
            self.waiting.remove(state)
            return
        self.active.remove(state)
        self._keep_prompt(state)
        self.tree.free(self.nodes[state.root])
        for branch in state.branches():
            self.nodes.pop(branch, None)
        state.forget_cache()

    def _is_coming(self, branch: Branch, awaited: Awaited) -> bool:
        """Whether the step in flight draws the next token of a branch."""
        fed = branch.fed == awaited.length  # not after it stepped back, when it is fed from its beginning
        return fed and awaited.step == self.planned and goes_on_after(branch, awaited.length)

    def is_wanted(self, sampled: Sampled) -> bool:
        """Whether a token that came back is the next one of its branch: not if the one before it ended the branch, or
        made it wait for paths, while this one was being drawn."""
        return sampled.branch in self.nodes and goes_on_after(sampled.branch, sampled.length)

    def check_fed(self, sampled: Sampled, token: int) -> None:
        """Take the token back from the cache if it was fed already, but other text was written instead."""
        _, branch, length = sampled
        if branch.fed > length and branch.ids[length : length + 1] != [token]:
            branch.fed = length
            self.tree.retract(self.nodes[branch])

    def reset(self) -> None:
        """Whatever state an exception left behind: no page has an owner, and all requests wait to be fed again."""
        self.in_flight = False
        self.nodes = {}
        for state in self.active:
            state.forget_cache()
        self.waiting = deque([*self.active, *(state for state in self.waiting if state not in self.active)])
        self.active = []
        self.prefixes.forget()
        self.tree.clear_ledger()
        self.book.reset()

    def pages_of(self, state: RequestState) -> Iterator[list[int]]:
        """Page lists of all living nodes of the request."""
        return (self.nodes[branch].pages.tolist() for branch in state.branches() if branch in self.nodes)

    def check_integrity(self) -> None:
        """Compare the page book with what all living nodes and kept prompts list (between steps)."""
        self.book.check_integrity([*(node.pages for node in self.nodes.values()), self.prefixes.pages])


def goes_on_after(branch: Branch, length: int) -> bool:
    """Whether a branch has written `length` tokens and goes on with one that is drawn."""
    all_joined = not branch.blocks or branch.blocks[-1].joined
    return len(branch.ids) == length and branch.finish is None and all_joined


def cache_block(branch: Branch) -> Block | None:
    """The next block of a branch that has to fork or join in the cache."""
    return branch.blocks[branch.num_joined] if branch.num_joined < len(branch.blocks) else None


def block_to_join(branch: Branch) -> Block | None:
    """The next block of a branch to join in the cache, if all its paths have ended and are fed to the end."""
    block = cache_block(branch)
    return block if block is not None and all(map(is_fed, block.kids)) else None


def feed_end(branch: Branch) -> int:
    """How many tokens of a branch may be fed before a block forks, or joins, in the cache."""
    block = cache_block(branch)
    return len(branch.ids) if block is None else block.at


def is_fed(branch: Branch) -> bool:
    """Whether a branch has ended and all its keys are in the cache."""
    return branch.finish is not None and branch.fed == len(branch.ids)


def holds_row(branch: Branch) -> bool:
    """Whether a branch with a place in the cache takes part in steps: not while it waits for its paths, not once it
    has ended and is fed."""
    return branch.fed < feed_end(branch) or (branch.finish is None and branch.num_joined == len(branch.blocks))
