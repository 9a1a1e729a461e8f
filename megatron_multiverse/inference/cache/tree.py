"""The tree of running sequences over the page book: append, fork, join, free. Integers only.

A node lists the pages of every token it sees; only the last page may be partly filled, so pages and length say where
each token is. Two rules keep it exact:

- a fork shares full pages and copies the open page at once, so a page with several owners is never written;
- a join leaves the tokens [0, len(parent)) where they are. After them any order will do, because keys are rotated by
  their positions before they are stored: full pages of the branches are taken over as they are, and only their ragged
  ends are copied. If the parent's own tokens moved, `base` of a node around it, which counts tokens in
  this order, would cut at the wrong place at its own join; no page count would notice.

Nothing is copied here. The tree keeps a ledger of what the next pass has to do: which slots to copy before it, and
which slots each of its tokens is written to.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from megatron_multiverse.inference.cache.book import PageBook, PageList

Slots = npt.NDArray[np.int64]
"""Places in the cache: page * page_size + offset in the page."""


class PageTable:
    """The page lists of all nodes, one line each, so that the lists of a step's rows are gathered in one operation.

    Args:
        padding: what a line holds after its list.
    """

    def __init__(self, padding: int) -> None:
        self.padding = padding
        self.lines: npt.NDArray[np.int32] = np.full((16, 16), padding, dtype=np.int32)
        self.free: list[int] = list(range(16))

    def take(self) -> int:
        """A line with nothing in it."""
        if not self.free:
            self.free = list(range(len(self.lines), 2 * len(self.lines)))
            self.lines = np.concatenate((self.lines, np.full_like(self.lines, self.padding)))
        return self.free.pop()

    def widen(self, width: int) -> None:
        """Make room for lists of `width` pages."""
        while self.lines.shape[1] < width:
            self.lines = np.concatenate((self.lines, np.full_like(self.lines, self.padding)), axis=1)

    def fill(self, lines: list[int], pages: PageList, last: list[int]) -> None:
        """Let these empty lines list the same pages, and behind them one of `last` each, if there are any."""
        count = len(pages)
        self.widen(count + bool(last))
        for line in lines:  # lines are few, and numpy takes longer to choose several
            self.lines[line, :count] = pages
        for line, page in zip(lines, last, strict=False):
            self.lines[line, count] = page

    def gather(self, lines: Slots, width: int) -> npt.NDArray[np.int32]:
        """The first `width` pages of these lines (`Node.line`, int64 [nodes]): int32 [nodes, width], a copy."""
        return self.lines[lines, :width]

    def clear(self) -> None:
        """There are no lists."""
        self.lines.fill(self.padding)
        self.free = list(range(len(self.lines)))


class Node:
    """One sequence that can run.

    Attributes:
        length: tokens listed.
        num_pages: pages listed.
        line: where the table lists them; -1 once the node is freed.
        base: index of its first own token; the tokens before it belong to the parent.
        last_page: the page that may be partly filled; -1 if there is none.
        parent: the node it was forked from.
        children: living nodes forked from it.
    """

    __slots__ = ("_table", "base", "children", "last_page", "length", "line", "num_pages", "parent")

    def __init__(self, table: PageTable, parent: Node | None = None) -> None:
        self.length = 0
        self.base = 0
        self.last_page = -1
        self.parent = parent
        self.children: list[Node] = []
        self.num_pages = 0
        self.line = table.take()
        self._table = table

    @property
    def pages(self) -> npt.NDArray[np.int32]:
        """Owned or shared pages, in order: int32, a view that holds until any list is changed."""
        return self._table.lines[self.line, : self.num_pages]

    def add_pages(self, pages: PageList) -> None:
        """Append pages to the list."""
        need = self.num_pages + len(pages)
        if need > self._table.lines.shape[1]:
            self._table.widen(need)
        if len(pages):
            self._table.lines[self.line, self.num_pages : need] = pages
            self.num_pages, self.last_page = need, int(pages[-1])

    def keep_pages(self, count: int) -> None:
        """Stop listing the pages after the first `count`."""
        line = self._table.lines[self.line]
        line[count : self.num_pages] = self._table.padding
        self.num_pages, self.last_page = count, int(line[count - 1]) if count else -1

    def clear(self) -> None:
        """List nothing any more, and have no line."""
        self.keep_pages(0)
        self._table.free.append(self.line)
        self.length, self.line = 0, -1


class Ledger(NamedTuple):
    """What a pass has to do with slots."""

    copies: Slots
    """[c, 2], (from, to): before the pass, all read before any is written."""
    write_slots: Slots
    """[m], a slot that receives a new token's key and value."""
    write_tokens: Slots
    """[m], the number of that token in the pass; a token whose slot is copied in this pass comes once for
    each slot."""


_NO_COPIES: Slots = np.empty((0, 2), dtype=np.int64)


class PageTree:
    """Operations on nodes that share one book."""

    def __init__(self, book: PageBook) -> None:
        self.book = book
        self.page_size = book.page_size
        self.table = PageTable(padding=book.num_pages)
        # Where the content of a slot comes from: another slot as it is before the pass, or ~k, the pass's token k.
        self._source: dict[int, int] = {}
        self._num_tokens = 0
        self._has_copies = False

    def root(self) -> Node:
        """A node that sees nothing yet."""
        return Node(self.table)

    def append_cost(self, node: Node, count: int) -> int:
        """Pages that appending `count` tokens will take."""
        return -(-(node.length + count) // self.page_size) - node.num_pages

    def fork_cost(self, node: Node, count: int) -> int:
        """Pages that forking `count` children will take."""
        return count if node.length % self.page_size else 0

    def slots(self, node: Node, start: int, end: int) -> list[int]:
        """Slots of the tokens [start, end) of a node."""
        size = self.page_size
        first, last = start // size, -(-end // size)
        if last == first + 1:  # as nearly always where paths begin and end
            shift = (int(self.table.lines[node.line, first]) - first) * size
            return list(range(start + shift, end + shift))
        pages = node.pages[first:last].tolist()
        found = [slot for page in pages for slot in range(page * size, page * size + size)]
        return found[start - first * size : end - first * size]

    def append(self, node: Node, count: int) -> bool:
        """Make room for the next `count` tokens of the pass at the end of a node; False, and nothing, if pages are
        missing."""
        start, offset = node.length, node.length % self.page_size
        if offset and offset + count <= self.page_size:  # they fit into the open page, as where a branch decodes
            assert self.book.owners[node.last_page] == 1, "a shared page must never be written"
            slot, token = node.last_page * self.page_size + offset, ~self._num_tokens
            if count == 1:
                self._source[slot] = token
            else:
                self._source.update(zip(range(slot, slot + count), range(token, token - count, -1), strict=True))
            node.length += count
            self._num_tokens += count
            return True
        if self.append_cost(node, count) > self.book.available:
            return False
        self._grow(node, count)
        last = ~self._num_tokens - count
        self._source.update(zip(self.slots(node, start, node.length), range(~self._num_tokens, last, -1), strict=True))
        self._num_tokens += count
        return True

    def append_like(self, node: Node, other: Node, count: int) -> bool:
        """Lengthen a node by the first `count` own tokens of a sibling, which stand at the same positions after the
        same text: slots of its own receive the same keys. False, and nothing, if pages are missing."""
        if self.append_cost(node, count) > self.book.available:
            return False
        start = node.length
        self._grow(node, count)
        self._copy(self.slots(other, other.base, other.base + count), self.slots(node, start, node.length))
        return True

    def append_one_each(self, nodes: list[Node], last_slots: Slots) -> Slots | None:
        """Make room for one more token of each of these nodes, all that the pass writes; None, and nothing, if pages
        are missing.

        Args:
            nodes: different ones.
            last_slots: int64 [nodes], the slots of their last tokens.

        Returns:
            The slots of the tokens, int64 [nodes]; the ledger stays empty.
        """
        slots = last_slots + 1
        full = (slots % self.page_size == 0).nonzero()[0].tolist()
        if full and len(full) > self.book.available:
            return None
        for row in full:
            nodes[row].add_pages(self.book.allocate(1))
            slots[row] = nodes[row].last_page * self.page_size
        for node in nodes:
            node.length += 1
        return slots

    def retract(self, node: Node) -> None:
        """Take back the last token of a node: it was fed before it was known, and turned out to be no part of the
        text."""
        node.length -= 1
        if node.length % self.page_size == 0:
            self.book.release([node.last_page])
            node.keep_pages(node.num_pages - 1)

    def truncate(self, node: Node, length: int) -> None:
        """Let a node end at an earlier token, of its own and before anything was joined into it. What was forked from
        it goes."""
        assert node.base <= length <= node.length
        for kid in list(node.children):
            self.free(kid)
        kept = -(-length // self.page_size)
        self.book.release(node.pages[kept:])
        node.keep_pages(kept)
        node.length = length

    def _grow(self, node: Node, count: int) -> None:
        """Lengthen a node, with new pages where the open one is full."""
        if count and node.length % self.page_size:
            assert self.book.owners[node.last_page] == 1, "a shared page must never be written"
        if missing := self.append_cost(node, count):
            node.add_pages(self.book.allocate(missing))
        node.length += count

    def share(self, node: Node, pages: list[int]) -> None:
        """Lengthen a root that ends with a page border by kept pages, which hold its next tokens already."""
        self.book.adopt(pages)
        node.add_pages(pages)
        node.length += len(pages) * self.page_size

    def fork(self, node: Node, count: int) -> list[Node]:
        """Children that see all of `node`: full pages shared, the open page copied."""
        ragged = node.length % self.page_size
        full = node.pages[: node.length // self.page_size]
        tails = self.book.allocate(self.fork_cost(node, count))
        open_slots = self._origins(self.slots(node, node.length - ragged, node.length))
        self.book.retain(full, count)
        kids = [Node(self.table, node) for _ in range(count)]
        self.table.fill([kid.line for kid in kids], full, tails)
        for kid in kids:
            kid.base = kid.length = node.length
            kid.num_pages, kid.last_page = len(full), int(full[-1]) if len(full) else -1
        for kid, tail in zip(kids, tails, strict=False):  # all or none have an open page
            kid.num_pages, kid.last_page = len(full) + 1, tail
            first = tail * self.page_size
            self._source.update(zip(range(first, first + ragged), open_slots, strict=True))
        self._has_copies = self._has_copies or bool(tails)
        node.children += kids
        return kids

    def join(self, parent: Node, kids: list[Node]) -> bool:
        """Append the own tokens of `kids` to `parent`; False, and nothing, if pages are missing.

        The children stay as they are, since their last tokens may be computed in the coming pass; free them once the
        step is planned. Joining them one by one, in any order, gives the same result but copies more.
        """
        source, whole, before = self._compaction(parent, kids)
        missing = self.append_cost(parent, before) + -(-(len(source) - before) // self.page_size)
        if missing > self.book.available:  # those of the children come free later
            return False
        start = parent.length
        self._grow(parent, before)
        self._copy(source[:before], self.slots(parent, start, parent.length))
        if whole:
            self.book.retain(whole)
            parent.add_pages(whole)
            parent.length += len(whole) * self.page_size
            start = parent.length
            self._grow(parent, len(source) - before)
            self._copy(source[before:], self.slots(parent, start, parent.length))
        return True

    def _compaction(self, parent: Node, kids: list[Node]) -> tuple[list[int], list[int], int]:
        """What a join does: slots to copy, pages to take over, how many of the slots go before those pages."""
        size = self.page_size
        source: list[int] = []
        whole: list[int] = []
        for kid in kids:
            # [head, tail): the kid's own tokens that fill whole pages. What lies before shares a page with tokens of
            # the parent, what lies after does not fill the kid's last page.
            head = min(-(-kid.base // size) * size, kid.length)
            tail = max(head, kid.length // size * size)
            if head > kid.base:
                source += self.slots(kid, kid.base, head)
            if tail < kid.length:
                source += self.slots(kid, tail, kid.length)
            if head < tail:
                whole += kid.pages[head // size : tail // size].tolist()
        if whole and len(source) < -parent.length % size:
            # Too few ragged tokens to fill the parent's open page: one whole page is copied there instead.
            page = whole.pop()
            source += range(page * size, page * size + size)
        # Whole pages can follow only where a page begins, so the tokens before them must end on a page border.
        before = len(source) - (parent.length + len(source)) % size if whole else len(source)
        return source, whole, before

    def _copy(self, source: list[int], target: list[int]) -> None:
        """Note that the targets receive what the sources hold, or will hold once the pass has written them."""
        self._has_copies = True
        self._source.update(zip(target, self._origins(source), strict=True))

    def _origins(self, slots: list[int]) -> list[int]:
        """Where what these slots will hold comes from.

        A slot may be the target of a copy noted before (a join and the fork after it can be planned in one step): what
        is copied from it comes from the first copy's origin, so the order of copies does not matter.
        """
        noted = self._source.get
        return [noted(slot, slot) for slot in slots]

    def take_ledger(self) -> Ledger:
        """What the pass has to do with slots; the next pass starts with an empty ledger."""
        source = self._source
        only_tokens = len(source) == self._num_tokens and not self._has_copies  # a slot each, in their order
        self.clear_ledger()
        slots = np.fromiter(source, dtype=np.int64, count=len(source))
        if only_tokens:
            return Ledger(_NO_COPIES, slots, np.arange(len(source)))
        origins = np.fromiter(source.values(), dtype=np.int64, count=len(source))
        copied, written = (origins >= 0).nonzero()[0], (origins < 0).nonzero()[0]
        copies = np.empty((len(copied), 2), dtype=np.int64)
        copies[:, 0], copies[:, 1] = origins[copied], slots[copied]
        return Ledger(copies, slots[written], ~origins[written])

    def clear_ledger(self) -> None:
        """Forget what was noted: the pass will not happen."""
        self._source, self._num_tokens, self._has_copies = {}, 0, False

    def reset(self) -> None:
        """There are no nodes."""
        self.clear_ledger()
        self.table.clear()

    def free(self, node: Node) -> None:
        """Give back the pages of `node` and of everything forked from it that still lives."""
        for kid in list(node.children):
            self.free(kid)
        self.book.release(node.pages)
        node.clear()
        if node.parent is not None:
            node.parent.children.remove(node)
            node.parent = None
