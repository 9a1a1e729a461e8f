"""Who runs in the next step: continuous batching with branches as rows.

Each step plans, in this order, over requests first come first served:

1. every branch that has something to feed (a page that is not there makes it wait, nothing else);
2. joins: a parent whose paths all ended takes their pages over and goes on, in the very step that feeds the last
   `</Path>`;
3. forks: paths start, in the very step that feeds `</Goal>`; all at once if they can ever run at once, else in
   waves as rows come free;
4. new requests, unless something that already runs waits for pages, or a fork for rows.

If nothing can run, `preemption.py` decides who steps back.
"""

from __future__ import annotations

from collections import deque

from megatron_multiverse.inference.branch import Block, Branch, Status
from megatron_multiverse.inference.commit import resume
from megatron_multiverse.inference.context import Row
from megatron_multiverse.inference.fork_join import join
from megatron_multiverse.inference.pages import PagePool
from megatron_multiverse.inference.prefix import PrefixCache
from megatron_multiverse.inference.request_state import RequestState
from megatron_multiverse.inference.tree import Node, PageTree


class Scheduler:
    """Plans steps.

    Args:
        pool: the pages.
        max_rows: most branches per step.
        max_step_tokens: most tokens per step beyond one per row; longer prompts are fed in chunks.
        prefix_pages: pages of finished prompts kept for later requests that begin alike.
    """

    def __init__(
        self,
        pool: PagePool,
        *,
        max_rows: int,
        max_step_tokens: int,
        prefix_pages: int = 0,
    ) -> None:
        self.pool = pool
        self.prefixes = PrefixCache(pool, prefix_pages)
        self.tree = PageTree(pool)
        self.max_rows = max_rows
        self.max_step_tokens = max_step_tokens
        self.waiting: deque[RequestState] = deque()
        self.active: list[RequestState] = []
        self._rows: list[Row] = []
        self._chunk_room = 0
        self._held = False  # something waits for pages or rows: admit nothing new, keep no prefixes
        self._retired: list[Node] = []
        self._released = False

    # -- one step ----------------------------------------------------------------------------------------------

    def plan(self) -> list[Row]:
        """Rows of the next step; empty if nothing can run (or nothing is left to do)."""
        if self._held:
            self.prefixes.clear()  # what runs needs the pages more
        self._rows, self._chunk_room, self._held = [], self.max_step_tokens, False
        for request in self.active:
            for branch in request.live:
                if branch.pending:
                    self._feed(branch)
        for request in self.active:
            self._join(request)
            self._start_paths(request, force=False)
        if not self._held:
            self._admit()
        if not self._rows and self.active:
            # Nothing fits at once: let single paths join or start, oldest request first.
            for request in self.active:
                self._join_one_by_one(request)
                self._join(request)
                self._start_paths(request, force=True)
        return self._rows

    def settle(self) -> bool:
        """The step has run: ended branches give back their rows and pages. Whether pages came free."""
        released = self._released or bool(self._retired)
        for node in self._retired:
            self.tree.free(node)
        self._retired, self._released = [], False
        for request in self.active:
            request.live = [branch for branch in request.live if branch.status is not Status.ENDED]
            if not request.prompt_kept and request.prompt_fed:
                request.prompt_kept = True
                assert request.root.node is not None
                self.prefixes.add(request.params.prompt_ids, request.root.node.pages)
        return released

    @property
    def rows_held(self) -> int:
        """Rows that living branches hold."""
        return sum(request.num_rows for request in self.active)

    def _feed(self, branch: Branch) -> None:
        """Put the branch into the step with as much of its pending text as fits; nothing if pages are missing."""
        node = branch.node
        assert node is not None
        if branch.parent is None and branch.finish is not None:
            return  # the answer is complete, its last tokens need no keys
        count = min(len(branch.pending), max(1, self._chunk_room))
        if len(self._rows) >= self.max_rows:
            return
        if self.tree.append_cost(node, count) > self.pool.num_free:
            self._held = True
            return
        self._chunk_room -= count
        start, position = node.length, node.next_pos
        self.pool.expect(self.tree.append(node, count).tolist())
        ids, branch.pending = branch.pending[:count], branch.pending[count:]
        sample = branch.status is Status.RUNNING and not branch.pending
        self._rows.append(Row(branch, node, ids, start, position, sample))
        if branch.status is Status.CLOSING and not branch.pending:
            branch.status = Status.ENDED

    def _run(self, branch: Branch) -> None:
        branch.status = Status.RUNNING
        branch.start_span()
        if branch not in branch.request.live:
            branch.request.live.append(branch)
        resume(branch)
        self._feed(branch)

    # -- joins -------------------------------------------------------------------------------------------------

    def _join(self, request: RequestState) -> None:
        for branch in list(request.live):
            block = branch.open_block
            if block is None or any(kid.status is not Status.ENDED for kid in block.kids):
                continue
            assert branch.node is not None
            if self.rows_held >= self.max_rows:
                continue
            kids = [kid.node for kid in block.kids if kid.node is not None]
            if kids:
                if self.tree.join_cost(branch.node, kids) > self.pool.num_free:
                    self._held = True
                    continue
                self.tree.join(branch.node, kids)
                # Their last tokens are computed in this step, over their own pages: free those afterwards.
                self._retired += kids
            for kid in block.kids:
                kid.node = None
            join(branch)
            branch.write(branch.machine.vocab.conclusion_prefix())
            self._run(branch)

    def _join_one_by_one(self, request: RequestState) -> None:
        """The way out when no row can run: each path that joins frees its pages for the next."""
        for branch in request.live:
            block = branch.open_block
            if block is None or any(kid.status is not Status.ENDED for kid in block.kids):
                continue
            assert branch.node is not None
            for kid in block.kids:
                if kid.node is not None and self.tree.join_cost(branch.node, [kid.node]) <= self.pool.num_free:
                    self.tree.join(branch.node, [kid.node])
                    self.tree.free(kid.node)
                    kid.node = None
                    self._released = True

    # -- forks -------------------------------------------------------------------------------------------------

    def _start_paths(self, request: RequestState, *, force: bool) -> None:
        """Start what can start."""
        for branch in reversed(list(request.live)):  # the deepest forked last, so inner paths go first
            block = branch.open_block
            if block is None or branch.pending or block.started == len(block.kids):
                continue
            limit = min(self.max_rows, request.params.max_concurrent_branches or self.max_rows)
            free = min(self.max_rows - self.rows_held, limit - request.num_rows)
            left = len(block.kids) - block.started
            at_once = not force and block.started == 0 and left <= limit
            count = self._affordable(branch, block, min(left, free))
            if count < (left if at_once else 1):
                self._held = self._held or at_once or free > 0
                continue
            self._start(branch, block, count)

    def _affordable(self, branch: Branch, block: Block, count: int) -> int:
        """How many of the next `count` paths the free pages hold, each with its first tokens."""
        assert branch.node is not None
        open_slots = branch.node.length % self.pool.page_size
        pages = 0
        for k, kid in enumerate(block.kids[block.started : block.started + max(count, 0)]):
            pages += -(-(open_slots + len(kid.pending)) // self.pool.page_size)
            if pages > self.pool.num_free:
                return k
        return max(count, 0)

    def _start(self, branch: Branch, block: Block, count: int) -> None:
        assert branch.node is not None
        kids = block.kids[block.started : block.started + count]
        block.started += count
        for kid, node in zip(kids, self.tree.fork(branch.node, count), strict=True):
            kid.node = node
            self._run(kid)

    # -- admission and removal ---------------------------------------------------------------------------------

    def _admit(self) -> None:
        while self.waiting and self.rows_held < self.max_rows:
            request = self.waiting[0]
            need = max(-(-(len(request.params.prompt_ids) + 1) // self.pool.page_size), request.pages_wanted)
            if self.active and need + self._promised() > self.pool.num_free:
                self._held = True
                return
            self.active.append(request)
            self.waiting.popleft()
            request.start()
            request.root.node = self.tree.root()
            if known := self.prefixes.find(request.params.prompt_ids):
                self.tree.share(request.root.node, known)
                del request.root.pending[: request.root.node.length]
            self._run(request.root)

    def _promised(self) -> int:
        """Pages that admitted prompts still need."""
        return sum(
            self.tree.append_cost(request.root.node, len(request.root.pending))
            for request in self.active
            if request.root.node is not None and not request.root.ids
        )

    def pages_of(self, request: RequestState) -> list[list[int]]:
        """Page lists of all living nodes of the request."""
        return [branch.node.pages for branch in request.branches() if branch.node is not None]

    def remove(self, request: RequestState) -> None:
        """Give back everything the request holds."""
        if request in self.waiting:
            self.waiting.remove(request)
            return
        self.active.remove(request)
        if request.root.node is not None:
            self.tree.free(request.root.node)
        for branch in request.branches():
            branch.node = None

    def reset(self) -> None:
        """Whatever state an exception left behind: no page has an owner, and all requests wait to start again."""
        for request in self.active:
            for branch in request.branches():
                branch.node = None
        self.waiting = deque([*self.active, *(request for request in self.waiting if request not in self.active)])
        self.active, self._retired, self._released = [], [], False
        self.prefixes.forget()
        self.pool.reset()

    def check_integrity(self) -> None:
        """The owner census over all living nodes (between steps)."""
        tables = [pages for request in self.active for pages in self.pages_of(request)]
        self.pool.check_integrity([*tables, self.prefixes.pages])
