"""Where each branch stands in the cache: how requests come by their places there, and what they give back.

The page tree knows nodes, the text knows branches; here they meet. `scheduler.py` decides who moves.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from megatron_multiverse.errors import GenerationError
from megatron_multiverse.inference.cache.book import PageBook
from megatron_multiverse.inference.cache.prefix import PageKeys, PrefixCache
from megatron_multiverse.inference.cache.tree import Node, PageTree
from megatron_multiverse.inference.text.branch import Branch
from megatron_multiverse.inference.text.state import RequestState


class Places:
    """The nodes of all requests that run.

    Args:
        book: the pages.
        prefix_cache: whether texts that begin alike share pages.
    """

    def __init__(self, book: PageBook, *, prefix_cache: bool) -> None:
        self.book = book
        self.tree = PageTree(book)
        self.prefixes = PrefixCache(book, enabled=prefix_cache)
        self.nodes: dict[Branch, Node] = {}
        """Each branch's node. Branches that have not started, or were joined into their parent, have none."""
        self._keys: dict[RequestState, PageKeys] = {}

    def put(self, state: RequestState, branch: Branch, node: Node) -> None:
        """A branch gets a place."""
        self.nodes[branch] = node
        state.live.append(branch)

    def pages_for(self, state: RequestState) -> int:
        """Pages that admitting a request takes, now or later, out of those that are available."""
        size, root = self.book.page_size, state.root
        known = self.prefixes.find(self._keys_of(state), root.ids, 0, (root.feed_end - 1) // size)
        need = max(-(-(len(state.request.prompt_ids) + 1) // size), state.pages_wanted)
        return need - int((self.book.owners[known] > 0).sum())

    def pages_promised(self, states: Iterable[RequestState]) -> int:
        """Pages that the prompts of admitted requests still need."""
        roots = [state.root for state in states if state.root.in_prompt]
        return sum(self.tree.append_cost(self.nodes[root], root.prompt_length - root.fed) for root in roots)

    def take_known(self, state: RequestState) -> None:
        """Take over the pages of a prompt that are known, from where it is fed up to its first fork."""
        root, node, size = state.root, self.nodes[state.root], self.book.page_size
        if node.length % size or state.scores_prompt:
            return
        known = self.prefixes.find(self._keys_of(state), root.ids, node.length // size, (root.feed_end - 1) // size)
        if known:
            self.tree.share(node, known)
            root.fed = node.length
            state.cached_tokens += len(known) * size if state.preemptions == 0 else 0

    def keep(self, state: RequestState, start: int, end: int) -> None:
        """The tokens [start, end) of a root are computed: others may take over the pages that they fill."""
        root, size = state.root, self.book.page_size
        self.prefixes.add(self._keys_of(state), root.ids, self.nodes[root].pages, start // size, end // size)

    def _keys_of(self, state: RequestState) -> PageKeys:
        if state not in self._keys:
            self._keys[state] = self.prefixes.keys(state.request.cache_salt)
        return self._keys[state]

    def leave(self, state: RequestState) -> None:
        """Give back everything a request holds; its text stays."""
        root = state.root
        if root in self.nodes:
            if state.finish_reason != "error":
                # What the root wrote before its first fork is causal text, which the next turn of a chat begins with.
                first = root.blocks[0].at if root.blocks else len(root.ids)
                self.keep(state, 0, min(root.fed, first))
            self.tree.free(self.nodes[root])
            for branch in state.branches():
                self.nodes.pop(branch, None)
            state.forget_cache()
        self._keys.pop(state, None)

    def distrust(self, state: RequestState) -> None:
        """What the model computed for the request cannot be right: no other text is to begin with it."""
        self.prefixes.drop(self.nodes[state.root].pages)

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
        """Whatever state an exception left behind: no page has an owner."""
        self.nodes.clear()
        self._keys.clear()
        self.prefixes.forget()
        self.tree.reset()
        self.book.reset()

    def pages_of(self, state: RequestState) -> Iterator[list[int]]:
        """Page lists of all living nodes of the request."""
        return (self.nodes[branch].pages.tolist() for branch in state.branches() if branch in self.nodes)

    def check_integrity(self) -> None:
        """Compare the page book and the table of lists with all living nodes (between steps).

        Raises:
            GenerationError: a page or a line is lost, or counted wrong.
        """
        nodes, table = list(self.nodes.values()), self.tree.table
        self.book.check_integrity([node.pages for node in nodes])
        if sorted([*table.free, *(node.line for node in nodes)]) != list(range(len(table.lines))):
            raise GenerationError("lines of the page table are lost or used twice; this is a fault, please report it")
