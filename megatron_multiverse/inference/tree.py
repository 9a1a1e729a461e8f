"""The tree of running sequences over the page pool: append, fork, join, free.

A node lists the slots of every token it sees, in pages of which only the last may be partly filled. Three rules
keep it exact:

- the position of the next token is stored (`next_pos`), never derived from a length: after a join the two differ;
- a fork shares full pages and copies the open page at once, so a page with several owners is never written;
- a join leaves indices [0, len(parent)) in place. Behind them order is free (positions sit inside the keys), so
  full pages of the branches move by reference and only ragged ends are copied. If the parent's own tokens moved,
  the `base` of an enclosing branch would point at the wrong tokens: page counts stay right while logits go wrong.
"""

from __future__ import annotations

import numpy as np

from megatron_multiverse.inference.pages import PagePool, Slots


class Node:
    """One sequence that can run.

    Attributes:
        pages: owned or shared pages, in order.
        length: tokens listed.
        base: index of the first token of its own; the ones before belong to the parent.
        next_pos: position of the next token.
        parent: the node it was forked from.
        children: living nodes forked from it.
    """

    __slots__ = ("_slots", "base", "children", "length", "next_pos", "pages", "parent")

    def __init__(self, next_pos: int = 0, parent: Node | None = None) -> None:
        self.pages: list[int] = []
        self.length = 0
        self.base = 0
        self.next_pos = next_pos
        self.parent = parent
        self.children: list[Node] = []
        self._slots: Slots = np.empty(64, dtype=np.int64)

    @property
    def slots(self) -> Slots:
        """Slot of every token, int64 ``[length]`` (a view)."""
        return self._slots[: self.length]

    def _extend(self, slots: Slots) -> None:
        need = self.length + len(slots)
        if need > len(self._slots):
            grown = np.empty(max(need, 2 * len(self._slots)), dtype=np.int64)
            grown[: self.length] = self.slots
            self._slots = grown
        self._slots[self.length : need] = slots
        self.length = need


class PageTree:
    """Operations on nodes that share one pool."""

    def __init__(self, pool: PagePool) -> None:
        self.pool = pool
        self.page_size = pool.page_size
        self._offsets = np.arange(pool.page_size, dtype=np.int64)

    def root(self) -> Node:
        """A new empty sequence at position 0."""
        return Node()

    # -- costs in pages, asked before acting -------------------------------------------------------------------

    def append_cost(self, node: Node, count: int) -> int:
        """Pages that appending `count` tokens will take."""
        return -(-(node.length + count) // self.page_size) - len(node.pages)

    def fork_cost(self, node: Node, count: int) -> int:
        """Pages that forking `count` children will take."""
        return count if node.length % self.page_size else 0

    def join_cost(self, parent: Node, kids: list[Node]) -> int:
        """Pages that a join will take (before the children's come free)."""
        source, _, before = self._compaction(parent, kids)
        head = -(-(parent.length + before) // self.page_size) - len(parent.pages)
        return head + -(-(len(source) - before) // self.page_size)

    def _bounds(self, kid: Node) -> tuple[int, int]:
        """Indices [head, tail) of `kid`'s own tokens that fill whole pages."""
        size = self.page_size
        head = min(-(-kid.base // size) * size, kid.length)
        return head, max(head, kid.length // size * size)

    def _compaction(self, parent: Node, kids: list[Node]) -> tuple[Slots, list[int], int]:
        """What a join does: slots to copy, pages to take over, how many of the slots go before those pages."""
        size = self.page_size
        ragged: list[Slots] = []
        whole: list[int] = []
        for kid in kids:
            head, tail = self._bounds(kid)
            ragged += [kid.slots[kid.base : head], kid.slots[tail : kid.length]]
            whole += kid.pages[head // size : tail // size]
        if whole and sum(map(len, ragged)) < -parent.length % size:
            # Too few ragged tokens to fill the parent's open page: give up one whole page for it.
            ragged.append(whole.pop() * size + self._offsets)
        source = np.concatenate(ragged)
        # What goes before the whole pages must end on a page border.
        before = len(source) - (parent.length + len(source)) % size if whole else len(source)
        return source, whole, before

    # -- operations --------------------------------------------------------------------------------------------

    def share(self, node: Node, pages: list[int]) -> None:
        """Let a new root begin with full pages that hold its first tokens already."""
        self.pool.retain(pages)
        node.pages = list(pages)
        grid = np.asarray(pages, dtype=np.int64)[:, None] * self.page_size + self._offsets
        node._extend(grid.reshape(-1))
        node.next_pos = node.length

    def append(self, node: Node, count: int) -> Slots:
        """Make room for `count` tokens at the end; returns their slots, int64 ``[count]``."""
        start = node.length
        self._append_slots(node, count)
        node.next_pos += count
        return node._slots[start : node.length]

    def _append_slots(self, node: Node, count: int) -> None:
        size = self.page_size
        room = len(node.pages) * size - node.length
        if room:
            assert self.pool.owners(node.pages[-1]) == 1, "a shared page must never be written"
            first = node.pages[-1] * size + size - room
            node._extend(np.arange(first, first + min(room, count), dtype=np.int64))
            count -= min(room, count)
        if count:
            pages = self.pool.allocate(-(-count // size))
            node.pages += pages
            grid = np.asarray(pages, dtype=np.int64)[:, None] * size + self._offsets
            node._extend(grid.reshape(-1)[:count])

    def fork(self, node: Node, count: int) -> list[Node]:
        """Children that see all of `node`: full pages shared, the open page copied, one copy call for all."""
        ragged = node.length % self.page_size
        full = node.pages[: node.length // self.page_size]
        tails = self.pool.allocate(self.fork_cost(node, count))
        kids = []
        for k in range(count):
            kid = Node(node.next_pos, node)
            self.pool.retain(full)
            kid.pages = list(full)
            kid._extend(node.slots[: node.length - ragged])
            if ragged:
                kid.pages.append(tails[k])
                kid._extend(tails[k] * self.page_size + self._offsets[:ragged])
            kid.base = node.length
            kids.append(kid)
        if ragged:
            source = np.tile(node.slots[node.length - ragged :], count)
            self.pool.copy(source, np.concatenate([kid.slots[node.length - ragged :] for kid in kids]))
        node.children += kids
        return kids

    def join(self, parent: Node, kids: list[Node]) -> None:
        """Append the own tokens of `kids` to `parent` and set its position behind the longest.

        The children stay valid (their last tokens may still have to be computed in this step); free them after.
        Joining them one by one, in any order, is as good, only more is copied.
        """
        source, whole, before = self._compaction(parent, kids)
        start = parent.length
        self._append_slots(parent, before)
        target = [parent.slots[start:]]
        if whole:
            self.pool.retain(whole)
            parent.pages += whole
            grid = np.asarray(whole, dtype=np.int64)[:, None] * self.page_size + self._offsets
            parent._extend(grid.reshape(-1))
            start = parent.length
            self._append_slots(parent, len(source) - before)
            target.append(parent.slots[start:])
        if len(source):
            self.pool.copy(source, np.concatenate(target))
        parent.next_pos = max(parent.next_pos, *(kid.next_pos for kid in kids))

    def free(self, node: Node) -> None:
        """Give back the pages of `node` and of everything forked from it that still lives."""
        for kid in list(node.children):
            self.free(kid)
        self.pool.release(node.pages)
        node.pages, node.length = [], 0
        if node.parent is not None:
            node.parent.children.remove(node)
            node.parent = None
