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

A branch is fed only up to `Block.at` of its next block, until that block is joined in the cache (`Branch.feed_end`).
`draft.py` gathers the rows, or, where nothing but the tokens of the last step's rows has changed, goes on with those;
`places.py` knows where the branches stand in the cache. If nothing can run, `preemption.py` decides who steps back.
"""

from __future__ import annotations

import bisect
from collections import deque

from megatron_multiverse.inference.cache.book import PageBook
from megatron_multiverse.inference.cache.tree import Node
from megatron_multiverse.inference.draft import Draft, Step, follow_up
from megatron_multiverse.inference.places import Places
from megatron_multiverse.inference.sampling_plan import Sampled
from megatron_multiverse.inference.text.branch import Block
from megatron_multiverse.inference.text.state import RequestState
from megatron_multiverse.inference.width import StepTime, allot

MOST_SCORED = 256
"""Tokens per step of a prompt whose log-probabilities are asked for: each needs the logits of a whole vocabulary."""


class Scheduler:
    """Plans steps.

    Args:
        book: the pages.
        max_rows: most branches per step, and most requests that run.
        max_step_tokens: most tokens per step of rows that bring more than one; longer prompts are fed in chunks.
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
        self.places = Places(book, prefix_cache=prefix_cache)
        self.max_rows = max_rows
        self.max_step_tokens = max_step_tokens
        self.step_time = step_time
        self.latency_target = latency_target
        self.waiting: deque[RequestState] = deque()
        """By priority, then in the order in which they came."""
        self.active: list[RequestState] = []
        """By priority, then in the order in which they were admitted: the first are fed first, the last steps back."""
        self.in_flight: Step | None = None
        """The step planned last, while its tokens are still to come: the next one takes them from the device."""
        self._last: Step | None = None  # the step planned last, if the next one differs only where its rows do
        self._pages_short = False  # whether something that runs waited for pages when the last step was planned
        self._with_blocks: list[RequestState] = []  # requests with a block that has yet to fork or join in the cache
        self._prompts: list[RequestState] = []  # requests whose prompt is not fed yet
        self._joined: list[Node] = []  # paths that the step planned last has joined; `let_go` frees them

    def queue(self, state: RequestState, *, first: bool = False) -> None:
        """Let a request wait behind those of its priority, or before them if it is the `first`."""
        find = bisect.bisect_left if first else bisect.bisect_right
        self.waiting.insert(find(self.waiting, state.request.priority, key=_priority), state)

    def go_on(self) -> Step | None:
        """The next step, if every row of the last one just goes on by a token; else None, and `plan` is to be asked.
        `withdraw` undoes it."""
        last, self._last = self._last, None
        if last is not None and (not self.waiting or len(self.active) >= self.max_rows):
            self._last = follow_up(last, self.places.tree, in_flight=self.in_flight is not None)
        return self._last

    def plan(self) -> Step | None:
        """The next step, whatever it brings; None if nothing can run (or nothing is left to do)."""
        while True:
            row_room, token_room = self._room()
            draft = Draft(
                self.places.tree,
                in_flight=self.in_flight,
                max_rows=self.max_rows,
                token_room=token_room,
                row_room=row_room,
            )
            self._feed_branches(draft)
            for state in self._with_blocks:
                self._join(draft, state)
                self._start_paths(draft, state)
            for state in self._prompts:
                if self.waiting:
                    self._admit(draft, before=state)
                self._feed_prompt(draft, state)
            if self.waiting:
                self._admit(draft)
            pages_came_free = False
            if not draft.nodes:
                # Nothing fits at once: let single paths join, oldest request first.
                for state in self._with_blocks:
                    pages_came_free |= self._join_one_by_one(state)
                    self._join(draft, state)
                    self._start_paths(draft, state)
            self._pages_short = draft.pages_short
            step = draft.finish() if draft.nodes else None
            # What waits for nothing but the tokens of these rows changes with them alone.
            nothing_else = not (draft.pages_short or draft.left_out or self._prompts or self._joined or row_room)
            if step is not None and nothing_else and step.only_draws and self.latency_target is None:
                self._last = step
            if step is not None or not (self._joined or pages_came_free):
                return step

    def _room(self) -> tuple[dict[RequestState, int] | None, int]:
        """How many rows each request may bring to a step (None: no limit), and how many tokens beyond one per row may
        enter."""
        # Without blocks it is one row each, and no more requests run than there are rows.
        if self.latency_target is None and not any(state.root.blocks for state in self.active):
            return None, self.max_step_tokens
        wanted = [self._wanted(state) for state in self.active]
        prompt = sum([s.root.prompt_length - s.root.fed for s in self.active if s.root.in_prompt])
        if not self._pages_short:
            for _, state in zip(range(self.max_rows - len(self.active)), self.waiting, strict=False):
                wanted.append([state.root.prompt_length])
                prompt += state.root.prompt_length
                if prompt >= self.max_step_tokens:
                    break
        if self.latency_target is None and sum(map(len, wanted)) <= self.max_rows:
            return None, self.max_step_tokens
        widths = allot(
            wanted,
            max_rows=self.max_rows,
            max_prompt=self.max_step_tokens,
            min_prompt=min(self.book.page_size, self.max_step_tokens),
            prompt=prompt,
            time=self.step_time,
            target=float("inf") if self.latency_target is None else self.latency_target,
        )
        return dict(zip(self.active, widths.rows, strict=False)), widths.prompt

    def _wanted(self, state: RequestState) -> list[int]:
        """Tokens that each row sees which the request would bring if there were no limit: at least as many rows as it
        turns out to have."""
        nodes = self.places.nodes
        if not state.root.blocks:
            return [nodes[state.root].length]
        visible = []
        for branch in state.live:
            length = nodes[branch].length
            block = branch.cache_block
            starting = 0 if block is None else len(block.kids) - block.started
            joining = block is not None and not starting and branch.block_to_join is not None
            visible += [length] * (branch.wants_row + starting + joining)
        return visible[: state.request.sampling.max_concurrent_branches]

    def _feed_branches(self, draft: Draft) -> None:
        """Feed every branch that has something to feed, but for prompts."""
        self.let_go()
        self._with_blocks, self._prompts = [], []
        feed, nodes = draft.feed, self.places.nodes
        for state in self.active:
            root = state.root
            if root.fed < root.prompt_length and root.in_prompt:
                self._prompts.append(state)
                continue
            plain = True
            for branch in state.live:
                feed(state, branch, nodes[branch])
                plain = plain and branch.finish is None and branch.num_joined == len(branch.blocks)
            if not plain:
                state.live = [branch for branch in state.live if not branch.is_fed]
                self._with_blocks.append(state)

    def _feed_prompt(self, draft: Draft, state: RequestState) -> None:
        """Put a chunk of a prompt, up to the first fork in it, into the step; what is known of it is taken over."""
        if state.awaits_scores:
            return
        self.places.take_known(state)
        root, size = state.root, self.book.page_size
        start, end = root.fed, root.feed_end
        count = min(end - start, draft.token_room, MOST_SCORED if state.scores_prompt else end)
        if count < 1:
            return
        if start + count < end:
            # A chunk ends with a page, so that the pages after it can be taken over once another request has them.
            border = (start + count) // size * size
            count = border - start if border > start else count
        draft.feed(state, root, self.places.nodes[root], count)
        self.places.keep(state, start, root.fed)

    def _join(self, draft: Draft, state: RequestState) -> None:
        """Every parent whose paths are fed to the end takes their pages over and goes on."""
        nodes, tree = self.places.nodes, self.places.tree
        for branch in list(state.live):
            block = branch.block_to_join
            if block is None:
                continue
            kids = [nodes[kid] for kid in block.kids if kid in nodes]
            if kids:
                if not tree.join(nodes[branch], kids):
                    draft.pages_short = True
                    continue
                self._joined += kids  # this step may still compute their last tokens, over their own pages
            for kid in block.kids:
                nodes.pop(kid, None)
            branch.num_joined += 1
            draft.feed(state, branch, nodes[branch])

    def _join_one_by_one(self, state: RequestState) -> bool:
        """The way out when no row can run: each path that joins frees its pages for the next. Whether any did."""
        nodes, tree = self.places.nodes, self.places.tree
        pages_came_free = False
        for branch in state.live:
            block = branch.block_to_join
            for kid in block.kids if block is not None else ():
                node = nodes.get(kid)
                if node is not None and tree.join(nodes[branch], [node]):
                    tree.free(nodes.pop(kid))
                    pages_came_free = True
        return pages_came_free

    def _start_paths(self, draft: Draft, state: RequestState) -> None:
        """Start as many paths as there are rows and pages for, in their order."""
        places = self.places
        limit = min(self.max_rows, state.request.sampling.max_concurrent_branches or self.max_rows)
        for branch in reversed(list(state.live)):  # inner branches started later, so their paths go first
            block = branch.cache_block
            if block is None or branch.fed < block.at or block.started == len(block.kids):
                continue
            free = min(draft.rows_left, limit - sum([other.wants_row for other in state.live]))
            if draft.row_room is not None:
                free = min(free, draft.row_room[state])
            wish = min(len(block.kids) - block.started, free)
            count = self._affordable(places.nodes[branch], block, wish)
            draft.pages_short |= count < wish
            if count < 1:
                continue
            kids = block.kids[block.started : block.started + count]
            block.started += count
            nodes = places.tree.fork(places.nodes[branch], count)
            for kid, node in zip(kids, nodes, strict=True):
                places.put(state, kid, node)
                if kid is not kids[0]:
                    draft.begin_like(kid, node, kids[0], nodes[0])
                draft.feed(state, kid, node)

    def _affordable(self, node: Node, block: Block, count: int) -> int:
        """How many of the next `count` paths the pages hold, each with the tokens it would bring first."""
        open_slots = node.length % self.book.page_size
        pages = 0
        for k, kid in enumerate(block.kids[block.started : block.started + max(count, 0)]):
            first = min(kid.feed_end, self.max_step_tokens)
            pages += -(-(open_slots + first) // self.book.page_size)
            if pages > self.book.available:
                return k
        return max(count, 0)

    def _admit(self, draft: Draft, before: RequestState | None = None) -> None:
        """Start the requests that wait, in their order, while rows, tokens and pages are free; all of them, or those of
        a higher priority than `before`."""
        places = self.places
        while (
            self.waiting
            and not draft.pages_short
            and draft.token_room > 0
            and draft.rows_left > 0
            and len(self.active) < self.max_rows
        ):
            state = self.waiting[0]
            if before is not None and _priority(state) >= _priority(before):
                return
            if self.active and places.pages_for(state) + places.pages_promised(self.active) > self.book.available:
                draft.pages_short = True
                return
            bisect.insort_right(self.active, self.waiting.popleft(), key=_priority)
            places.put(state, state.root, places.tree.root())
            if draft.row_room is not None:
                draft.row_room[state] = 1
            self._feed_prompt(draft, state)

    def let_go(self) -> None:
        """Free the pages of the paths that the step planned last has joined, which takes long enough to be left until
        the step runs."""
        joined, self._joined = self._joined, []
        for node in joined:
            self.places.tree.free(node)

    def remove(self, state: RequestState) -> None:
        """The request takes part no more and gives back everything it holds in the cache; its text stays."""
        self._last = None
        (self.waiting if state in self.waiting else self.active).remove(state)
        self.places.leave(state)

    def drop_tries(self, state: RequestState) -> None:
        """Take the tries that were dropped out of the cache."""
        self._last = None
        self.places.take_back(state)

    def take_back(self, sampled: Sampled, token: int) -> None:
        """Take a token that was fed before it was known back from the cache, if other text was written instead."""
        _, branch, length = sampled
        if branch.ids[length : length + 1] != [token]:
            branch.fed = length
            self.places.tree.retract(self.places.nodes[branch])

    def feed_again(self, sampled: Sampled) -> None:
        """Draw once more after the last token of a branch, which is fed again for that."""
        _, branch, length = sampled
        if branch.fed == length:
            branch.fed -= 1
            self.places.tree.retract(self.places.nodes[branch])

    def withdraw(self, step: Step) -> None:
        """Undo a step that `go_on` has planned and that will not run."""
        self._last = None
        for (_, branch, _), node in zip(step.sampled, step.nodes, strict=True):
            branch.fed -= 1
            self.places.tree.retract(node)

    def reset(self) -> None:
        """Whatever state an exception left behind: all requests wait to be fed again."""
        self.in_flight = self._last = None
        self._joined = []
        for state in self.active:
            state.forget_cache()
            state.cached_tokens = 0  # it has to compute all of its prompt now
        waiting = [*self.active, *(state for state in self.waiting if state not in self.active)]
        self.waiting = deque(sorted(waiting, key=_priority))
        self.active = []
        self.places.reset()


def _priority(state: RequestState) -> int:
    return state.request.priority
