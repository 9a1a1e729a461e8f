"""Who is fed in the next step: continuous batching with branches as rows. Reads text and writes none; the counters
of what is fed and joined (`Branch.fed`, `Branch.num_joined`, `Block.started`) move here, ahead of the pass.

Each step is planned in this order, over requests first come first served:

1. every branch that has written more than the cache has seen brings its next tokens, as far as the width of the step
   allows (`width.py`); one that is left out, or finds no page, keeps its pages and waits;
2. joins: where the last token of the last path is fed, the parent takes over the pages of its paths and goes on, in
   this very step;
3. forks: where `</Goal>` is fed, paths start in this very step, as many as the width allows; the others later;
4. prompts, in chunks, with the tokens that the step has left: known pages are taken over, the others computed;
5. new requests, unless something that already runs waits for pages.

A branch is fed only up to `Block.at` of its next block, until that block is joined in the cache (`text/feed.py`). If
nothing can run, `preemption.py` decides who steps back.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from megatron_multiverse.inference.cache.book import PageBook
from megatron_multiverse.inference.cache.prefix import PageKeys, PrefixCache
from megatron_multiverse.inference.cache.tree import Node, PageTree
from megatron_multiverse.inference.draft import Draft, Step
from megatron_multiverse.inference.sampling_plan import Sampled, Scored
from megatron_multiverse.inference.text.branch import Awaited, Block, Branch
from megatron_multiverse.inference.text.feed import (
    block_to_join,
    cache_block,
    feed_end,
    goes_on_after,
    is_fed,
    wants_row,
)
from megatron_multiverse.inference.text.state import RequestState
from megatron_multiverse.inference.width import StepTime, allot

MOST_SCORED = 256
"""Tokens per step of a prompt whose log-probabilities are asked for: each needs the logits of a whole vocabulary."""


class Scheduler:
    """Plans steps.

    Args:
        book: the pages.
        max_rows: most branches per step, and most requests that run.
        max_step_tokens: most tokens per step beyond one per row; longer prompts are fed in chunks.
        prefix_cache: whether texts that begin alike share pages.
        step_time: predicts how long steps take; needed for `latency_target`.
        latency_target: seconds that a step should take at most; None lets it be as wide as `max_rows`.
    """

    def __init__(
        self,
        book: PageBook,
        *,
        max_rows: int,
        max_step_tokens: int,
        prefix_cache: bool = True,
        step_time: StepTime | None = None,
        latency_target: float | None = None,
    ) -> None:
        self.book = book
        self.prefixes = PrefixCache(book, enabled=prefix_cache)
        self.tree = PageTree(book)
        self.max_rows = max_rows
        self.max_step_tokens = max_step_tokens
        self.step_time = step_time
        self.latency_target = latency_target
        self.waiting: deque[RequestState] = deque()
        self.active: list[RequestState] = []
        self.nodes: dict[Branch, Node] = {}
        """Each branch's node in the cache. Branches that have not started, or were joined into their parent, have
        none."""
        self.planned = 0
        """Number of the step planned last."""
        self.in_flight = False
        """Whether that step's tokens are still to come; the next one then takes them from the device."""
        self._keys: dict[RequestState, PageKeys] = {}
        self._draft = Draft()
        self._token_room = 0  # tokens beyond one per row that may still enter the step
        self._row_room: dict[RequestState, int] | None = None  # rows that each request may still bring; None: no limit
        self._pages_short = False  # something that runs waits for pages: admit nothing new
        self._with_blocks: list[RequestState] = []  # requests with a block that has yet to fork or join in the cache
        self._prompts: list[RequestState] = []  # requests whose prompt is not fed yet
        self._joined: list[Node] = []  # their pages come free once the step is planned

    def plan(self) -> Step | None:
        """The next step; None if nothing can run (or nothing is left to do)."""
        while True:
            self._begin_step()
            for state in self._with_blocks:
                self._join(state)
                self._start_paths(state)
            for state in self._prompts:
                self._feed_prompt(state)
            self._admit()
            pages_came_free = False
            if not self._draft.nodes:
                # Nothing fits at once: let single paths join, oldest request first.
                for state in self._with_blocks:
                    pages_came_free |= self._join_one_by_one(state)
                    self._join(state)
                    self._start_paths(state)
            step = self._make_step() if self._draft.nodes else None
            for node in self._joined:
                self.tree.free(node)
            if step is not None or not (self._joined or pages_came_free):
                return step

    def _begin_step(self) -> None:
        """Feed every branch that has something to feed, but for prompts."""
        self._draft = Draft()
        self._share_step()
        self._pages_short = False
        self._with_blocks, self._prompts, self._joined = [], [], []
        for state in self.active:
            root = state.root
            if root.fed < root.prompt_length and in_prompt(root):
                self._prompts.append(state)
                continue
            plain = True
            for branch in state.live:
                self._feed(state, branch)
                plain = plain and branch.finish is None and branch.num_joined == len(branch.blocks)
            if not plain:
                state.live = [branch for branch in state.live if not is_fed(branch)]
                self._with_blocks.append(state)

    def _share_step(self) -> None:
        """How many rows each request may bring, and how many tokens beyond them may enter."""
        self._token_room, self._row_room = self.max_step_tokens, None
        if self.latency_target is None and not any(state.root.blocks for state in self.active):
            return  # one row each, and no more requests run than there are rows
        wanted = [self._wanted(state) for state in self.active]
        prompt = sum(state.root.prompt_length - state.root.fed for state in self.active if in_prompt(state.root))
        if not self._pages_short:
            for _, state in zip(range(self.max_rows - len(self.active)), self.waiting, strict=False):
                wanted.append([state.root.prompt_length])
                prompt += state.root.prompt_length
                if prompt >= self.max_step_tokens:
                    break
        if self.latency_target is None and sum(map(len, wanted)) <= self.max_rows:
            return
        widths = allot(
            wanted,
            max_rows=self.max_rows,
            max_prompt=self.max_step_tokens,
            min_prompt=min(self.book.page_size, self.max_step_tokens),
            prompt=prompt,
            time=self.step_time,
            target=float("inf") if self.latency_target is None else self.latency_target,
        )
        self._token_room = widths.prompt
        self._row_room = dict(zip(self.active, widths.rows, strict=False))

    def _wanted(self, state: RequestState) -> list[int]:
        """Tokens that each row sees which the request would bring if there were no limit: at least as many rows as it
        turns out to have."""
        if not state.root.blocks:
            return [self.nodes[state.root].length]
        visible = []
        for branch in state.live:
            length = self.nodes[branch].length
            block = cache_block(branch)
            starting = 0 if block is None else len(block.kids) - block.started
            joining = block is not None and not starting and block_to_join(branch) is not None
            visible += [length] * (wants_row(branch) + starting + joining)
        return visible[: state.request.sampling.max_concurrent_branches]

    def _feed(self, state: RequestState, branch: Branch, most: int | None = None) -> None:
        """Put the branch into the step with its next tokens, as many as fit or as `most` says; leave it out if there is
        no row for it, or no page."""
        all_joined = branch.num_joined == len(branch.blocks)
        known = len(branch.ids)
        ahead = self.in_flight and branch.awaits is not None and self._is_coming(branch, branch.awaits)
        start, end = branch.fed, known + ahead if all_joined else feed_end(branch)
        if start == end:
            return
        draft, row_room = self._draft, self._row_room
        if len(draft.nodes) >= self.max_rows or (row_room is not None and row_room[state] < 1):
            if not ahead:
                state.end_span(branch, state.step + self.in_flight)
            return
        node = self.nodes[branch]
        count = end - start
        if count > 1:  # one token always enters
            count = most or min(count, max(1, self._token_room))
        if not self.tree.append(node, count):
            self._pages_short = True
            return
        if count > 1:
            self._token_room -= count
        if row_room is not None:
            row_room[state] -= 1
        branch.fed += count
        if all_joined and branch.finish is None and branch.fed == end:
            draft.sample.append(len(draft.nodes))
            draft.sampled.append(Sampled(state, branch, end))
            draft.draws.append(branch.num_sampled + ahead)
            draft.coming.append(branch.awaits.row if ahead and branch.awaits is not None else -1)
            if branch.span_start is None:
                branch.span_start = (state.step + self.in_flight, end)  # the timeline shows it from here
        if state.scores_prompt and start + 1 < branch.prompt_length:
            last = min(start + count, branch.prompt_length - 1)
            draft.scored.append(Scored(state, len(draft.ids), start, last - start))
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

    def _feed_prompt(self, state: RequestState) -> None:
        """Take over the known pages of a text up to its first fork, then put a chunk of the rest into the step."""
        root, node, size = state.root, self.nodes[state.root], self.book.page_size
        keys, end = self._keys[state], feed_end(root)
        known: list[int] = []
        if node.length % size == 0 and not state.scores_prompt:
            known = self.prefixes.find(keys, root.ids, node.length // size, (end - 1) // size)
        if known:
            self.tree.share(node, known)
            root.fed = node.length
            state.cached_tokens += len(known) * size if state.preemptions == 0 else 0
        start = root.fed
        count = min(end - start, self._token_room, MOST_SCORED if state.scores_prompt else end)
        if count < 1:
            return
        if start + count < end:
            # A chunk ends with a page, so that the pages after it can be taken over once another request has them.
            border = (start + count) // size * size
            count = border - start if border > start else count
        self._feed(state, root, count)
        self.prefixes.add(keys, root.ids, node.pages, start // size, root.fed // size)

    def _place(self, state: RequestState, branch: Branch, node: Node) -> None:
        """A branch gets a place in the cache."""
        self.nodes[branch] = node
        state.live.append(branch)

    def _join(self, state: RequestState) -> None:
        """Every parent whose paths are fed to the end takes their pages over and goes on."""
        for branch in list(state.live):
            block = block_to_join(branch)
            if block is None:
                continue
            kids = [self.nodes[kid] for kid in block.kids if kid in self.nodes]
            if kids:
                node = self.nodes[branch]
                if self.tree.join_cost(node, kids) > self.book.available:
                    self._pages_short = True
                    continue
                self.tree.join(node, kids)
                self._joined += kids  # this step may still compute their last tokens, over their own pages
            for kid in block.kids:
                self.nodes.pop(kid, None)
            branch.num_joined += 1
            self._feed(state, branch)

    def _join_one_by_one(self, state: RequestState) -> bool:
        """The way out when no row can run: each path that joins frees its pages for the next. Whether any did."""
        pages_came_free = False
        for branch in state.live:
            block = block_to_join(branch)
            for kid in block.kids if block is not None else ():
                node = self.nodes.get(kid)
                if node is not None and self.tree.join_cost(self.nodes[branch], [node]) <= self.book.available:
                    self.tree.join(self.nodes[branch], [node])
                    self.tree.free(self.nodes.pop(kid))
                    pages_came_free = True
        return pages_came_free

    def _start_paths(self, state: RequestState) -> None:
        """Start as many paths as there are rows and pages for, in their order."""
        limit = min(self.max_rows, state.request.sampling.max_concurrent_branches or self.max_rows)
        for branch in reversed(list(state.live)):  # inner branches started later, so their paths go first
            block = cache_block(branch)
            if block is None or branch.fed < block.at or block.started == len(block.kids):
                continue
            free = min(self.max_rows - len(self._draft.nodes), limit - sum(map(wants_row, state.live)))
            if self._row_room is not None:
                free = min(free, self._row_room[state])
            wish = min(len(block.kids) - block.started, free)
            count = self._affordable(self.nodes[branch], block, wish)
            self._pages_short |= count < wish
            if count < 1:
                continue
            kids = block.kids[block.started : block.started + count]
            block.started += count
            for kid, node in zip(kids, self.tree.fork(self.nodes[branch], count), strict=True):
                self._place(state, kid, node)
                self._feed(state, kid)

    def _affordable(self, node: Node, block: Block, count: int) -> int:
        """How many of the next `count` paths the pages hold, each with the tokens it would bring first."""
        open_slots = node.length % self.book.page_size
        pages = 0
        for k, kid in enumerate(block.kids[block.started : block.started + max(count, 0)]):
            first = min(feed_end(kid), self.max_step_tokens)
            pages += -(-(open_slots + first) // self.book.page_size)
            if pages > self.book.available:
                return k
        return max(count, 0)

    def _admit(self) -> None:
        """Start the requests that wait, in their order, while rows, tokens and pages are free."""
        while (
            self.waiting
            and not self._pages_short
            and self._token_room > 0
            and len(self._draft.nodes) < self.max_rows
            and len(self.active) < self.max_rows
        ):
            state = self.waiting[0]
            if self.active and self._pages_for(state) + self._promised() > self.book.available:
                self._pages_short = True
                return
            self.active.append(self.waiting.popleft())
            self._place(state, state.root, Node())
            if state not in self._keys:
                self._keys[state] = self.prefixes.keys(state.request.cache_salt)
            if self._row_room is not None:
                self._row_room[state] = 1
            self._feed_prompt(state)

    def _pages_for(self, state: RequestState) -> int:
        """Pages that admitting a request takes, now or later, out of those that are available."""
        size, root = self.book.page_size, state.root
        if state not in self._keys:
            self._keys[state] = self.prefixes.keys(state.request.cache_salt)
        known = self.prefixes.find(self._keys[state], root.ids, 0, (feed_end(root) - 1) // size)
        need = max(-(-(len(state.request.prompt_ids) + 1) // size), state.pages_wanted)
        return need - int((self.book.owners[known] > 0).sum())

    def _promised(self) -> int:
        """Pages that admitted prompts still need."""
        return sum(
            self.tree.append_cost(self.nodes[state.root], state.root.prompt_length - state.root.fed)
            for state in self.active
            if in_prompt(state.root)
        )

    def _make_step(self) -> Step:
        """The draft as a step; every branch that draws in it remembers so."""
        self.planned += 1
        for row, (_, branch, length) in enumerate(self._draft.sampled):
            branch.awaits = Awaited(self.planned, row, length)
        return Step(self._draft.make_plan(self.tree), self._draft.sampled, self._draft.scored)

    def remove(self, state: RequestState) -> None:
        """Give back everything the request holds in the cache; its text stays."""
        keys = self._keys.pop(state, None)
        if state in self.waiting:
            self.waiting.remove(state)
            return
        self.active.remove(state)
        root, node = state.root, self.nodes[state.root]
        if state.finish_reason != "error":
            assert keys is not None
            # What the root wrote before its first fork is causal text, which the next turn of a chat begins with.
            first = root.blocks[0].at if root.blocks else len(root.ids)
            size = self.book.page_size
            self.prefixes.add(keys, root.ids, node.pages, 0, min(root.fed, first) // size)
        self.tree.free(node)
        for branch in state.branches():
            self.nodes.pop(branch, None)
        state.forget_cache()

    def distrust(self, state: RequestState) -> None:
        """What the model computed for the request cannot be right: no other text is to begin with it."""
        self.prefixes.drop(self.nodes[state.root].pages)

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

    def take_back(self, state: RequestState) -> None:
        """Give back the pages of tries that were dropped, but for their first tokens, which go on to be fed."""
        for branch, kept, inner in state.cuts:
            for gone in inner:
                self.nodes.pop(gone, None)
            state.live = [other for other in state.live if other not in inner]
            node = self.nodes.get(branch)
            branch.fed, branch.num_joined = min(branch.fed, kept), 0
            if node is not None:
                available = self.book.available
                self.tree.truncate(node, node.base + branch.fed)
                state.freed_pages += self.book.available - available
                if branch not in state.live:
                    state.live.append(branch)
        state.cuts = []

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
        """Compare the page book with what all living nodes list (between steps)."""
        self.book.check_integrity([node.pages for node in self.nodes.values()])


def in_prompt(root: Branch) -> bool:
    """Whether a root is still fed its prompt, up to the first fork in it."""
    return root.fed < root.prompt_length and root.num_joined == 0 and root.fed < feed_end(root)
