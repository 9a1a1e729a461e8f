"""Without a model: book and tree against lists of lists."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_multiverse.errors import GenerationError
from megatron_multiverse.inference.cache.book import PageBook
from megatron_multiverse.inference.cache.tree import Node, PageTree
from megatron_multiverse.inference.step.forward import KVStore


class Oracle:
    """A tree whose cache holds token numbers, so the contents of every node can be read back."""

    def __init__(self, num_pages: int, page_size: int) -> None:
        self.book = PageBook(num_pages, page_size)
        self.tree = PageTree(self.book)
        self.slots = np.full(num_pages * page_size, -1)
        self.want: dict[Node, list[int]] = {}
        self.counter = 0
        self.pending: list[int] = []

    def run(self) -> None:
        """The pass: what the ledger notes happens to the slots, copies first."""
        copies, write_slots, write_tokens = self.tree.take_ledger()
        self.slots[copies[:, 1]] = self.slots[copies[:, 0]]
        self.slots[write_slots] = np.array(self.pending, dtype=np.int64)[write_tokens]
        self.pending = []

    def root(self) -> Node:
        node = self.tree.root()
        self.want[node] = []
        return node

    def append(self, node: Node, count: int) -> bool:
        if self.tree.append_cost(node, count) > self.book.available:
            with pytest.raises(GenerationError, match="pages asked for"):
                self.book.allocate(self.book.available + 1)
            return False
        self.tree.append(node, count)
        numbers = list(range(self.counter, self.counter + count))
        self.counter += count
        self.pending += numbers
        self.want[node] += numbers
        return True

    def fork(self, node: Node, count: int, *, at_once: bool = True) -> list[Node]:
        """at_once: everything noted so far happens before, so that the copies can be counted."""
        if self.tree.fork_cost(node, count) > self.book.available:
            return []
        if at_once:
            self.run()
        kids = self.tree.fork(node, count)
        if at_once:
            assert len(self.tree._source) == count * (len(self.want[node]) % self.book.page_size)
        for kid in kids:
            self.want[kid] = list(self.want[node])
            assert kid.base == len(self.want[node])
        return kids

    def join(self, node: Node, one_by_one: bool, *, at_once: bool = True) -> int:
        """Returns how many tokens were copied, if everything noted before happened first (`at_once`)."""
        copied = 0
        kids = list(node.children)
        if not kids or any(kid.children for kid in kids):
            return 0
        length = len(self.want[node])
        own = sorted(number for kid in kids for number in self.want[kid][length:])
        for group in [[kid] for kid in kids] if one_by_one else [kids]:
            if at_once:
                self.run()
            free, length_before = self.book.available, node.length
            if not self.tree.join(node, group):
                assert (free, length_before) == (self.book.available, node.length)
                if group[0] is not kids[0]:
                    self.free(node)  # halfway and stuck: give the tree up
                return 0
            if at_once:
                count = len(self.tree._source)
                assert count <= (2 * len(group) + 1) * self.book.page_size
                assert count == 0 or self.book.page_size > 1
                copied += count
            for kid in group:
                self.free(kid)
        self.run()
        # Indices below the parent's length stay in place; after them the order is free.
        got = self.read(node)
        assert got[:length] == self.want[node]
        assert sorted(got[length:]) == own
        self.want[node] = got
        return copied

    def free(self, node: Node) -> None:
        for kid in list(node.children):
            self.free(kid)
        self.tree.free(node)
        del self.want[node]

    def read(self, node: Node) -> list[int]:
        return self.slots[self.tree.slots(node, 0, node.length)].tolist()

    def check(self) -> None:
        self.book.check_integrity([node.pages for node in self.want])
        table = self.tree.table
        assert sorted([*table.free, *(node.line for node in self.want)]) == list(range(len(table.lines)))
        lines = table.gather(np.array([node.line for node in self.want], dtype=np.int64), table.lines.shape[1])
        for node, line in zip(self.want, lines, strict=True):
            assert line[: node.num_pages].tolist() == node.pages.tolist()
            assert (line[node.num_pages :] == self.book.num_pages).all()
        for node, want in self.want.items():
            assert node.length == len(want)
            assert len(node.pages) == -(-node.length // self.book.page_size)

    def check_contents(self) -> None:
        self.run()
        for node, want in self.want.items():
            assert self.read(node) == want


ACTIONS = st.tuples(
    st.sampled_from(["append", "fork", "join", "free", "root", "run"]), st.integers(0, 99), st.integers(1, 40)
)


@settings(max_examples=300, deadline=None)
@given(page_size=st.sampled_from([1, 4, 16, 64]), actions=st.lists(ACTIONS, min_size=5, max_size=60))
def test_random_histories_match_lists(page_size, actions):
    """Forks and joins of what is in the cache, and of what is only noted for the coming pass."""
    oracle = Oracle(max(8, 400 // page_size), page_size)
    oracle.root()
    for action, which, amount in [("append", 0, 7), *actions]:
        nodes = list(oracle.want)
        node = nodes[which % len(nodes)] if nodes else oracle.root()
        at_once = amount % 3 == 0
        if action == "append" and not node.children:
            oracle.append(node, amount)
        elif action == "fork" and not node.children:
            for kid in oracle.fork(node, amount % 4 + 1, at_once=at_once):
                oracle.append(kid, which % 20 + 1)
        elif action == "join":
            oracle.join(node, one_by_one=amount % 2 == 0, at_once=at_once)
        elif action == "free":
            oracle.free(node)
        elif action == "root" and len(nodes) < 12:
            oracle.root()
        elif action == "run":
            oracle.check_contents()
        oracle.check()
    oracle.check_contents()
    for node in [node for node in oracle.want if node.parent is None]:
        oracle.free(node)
    assert oracle.book.available == oracle.book.num_pages
    oracle.book.check_integrity([])


def test_a_join_with_too_few_ragged_tokens_gives_up_one_whole_page():
    oracle = Oracle(20, 16)
    root = oracle.root()
    oracle.append(root, 16)
    first, second = oracle.fork(root, 2)
    oracle.append(first, 2)
    oracle.append(second, 32)
    # After the first path fourteen slots of the open page are free and the second has no ragged token to fill them.
    assert oracle.join(root, one_by_one=True) == 2 + 16
    oracle.check_contents()


def test_a_copy_of_what_is_not_written_yet_follows_the_token():
    """Also a copy of such a copy, as when a join and the fork after it are planned in one step."""
    tree = PageTree(PageBook(8, 4))
    root = tree.root()
    tree.append(root, 2)
    (kid,) = tree.fork(root, 1)
    (grandkid,) = tree.fork(kid, 1)
    copies, write_slots, write_tokens = tree.take_ledger()
    assert len(copies) == 0
    want = [(int(tree.slots(node, i, i + 1)[0]), i) for i in range(2) for node in (root, kid, grandkid)]
    assert sorted(zip(write_slots.tolist(), write_tokens.tolist(), strict=True)) == sorted(want)
    assert all(len(part) == 0 for part in tree.take_ledger())


@pytest.mark.parametrize(("page_size", "length"), [(1, 3), (4, 4), (4, 6), (16, 15)])
def test_what_siblings_begin_with_alike_is_written_to_slots_of_each(page_size, length):
    """The first three of the five tokens of one, whether they are in the cache already or come with this pass."""
    for before in (False, True):
        tree = PageTree(PageBook(80 // page_size, page_size))
        root = tree.root()
        tree.append(root, length)
        first, other = tree.fork(root, 2)
        tree.take_ledger()
        tree.append(first, 5)
        if before:
            tree.take_ledger()
        assert tree.append_like(other, first, 3) and tree.append(other, 1)
        copies, write_slots, write_tokens = tree.take_ledger()
        theirs, mine = (tree.slots(node, length, length + 3) for node in (first, other))
        written = list(zip(write_slots.tolist(), write_tokens.tolist(), strict=True))
        last = int(tree.slots(other, length + 3, length + 4)[0])
        if before:
            assert copies.tolist() == [[*pair] for pair in zip(theirs, mine, strict=True)] and written == [(last, 0)]
        else:
            assert not len(copies) and {(slot, token) for token, slot in enumerate(mine)} | {(last, 5)} <= set(written)
        assert not set(theirs) & set(mine) and other.length == length + 4
        if page_size > 1:
            assert not tree.append_like(other, first, 80) and other.length == length + 4, "no pages, no change"


def test_a_copy_of_a_copy_reads_what_was_there_before_the_pass():
    oracle = Oracle(8, 4)
    root = oracle.root()
    oracle.append(root, 6)
    oracle.run()
    (kid,) = oracle.fork(root, 1, at_once=False)
    (grandkid,) = oracle.fork(kid, 1, at_once=False)
    copies = oracle.tree._source
    assert set(copies.values()) == set(oracle.tree.slots(root, 4, 6))
    assert len(copies) == 4
    oracle.check_contents()
    assert oracle.read(grandkid) == oracle.want[root]


def test_freed_pages_are_named_once_and_only_while_they_are_free():
    book = PageBook(4, 4, remember_freed=True)
    assert sorted(book.take_freed()) == [0, 1, 2, 3]  # nothing was ever written there
    pages = book.allocate(3)
    assert book.take_freed() == []
    book.release(pages[:2])
    book.allocate(1)
    assert book.take_freed() == [page for page in pages[:2] if page in book.free]
    assert book.take_freed() == []


def test_a_store_poisons_the_pages_it_is_told_and_copies_before_it_writes():
    store = KVStore(3, 4, num_layers=2, num_kv_heads=1, head_dim=1, dtype=torch.float64)
    store.keys[:] = torch.arange(16.0).view(1, 4, 4, 1, 1)
    store.values[:] = -store.keys
    store.copy(np.array([[0, 1], [1, 2]]))
    assert store.keys[1, 0, :, 0, 0].tolist() == [0, 0, 1, 3]
    assert torch.equal(store.values, -store.keys)
    store.poison(np.array([1]))
    assert store.keys[:, 1].isnan().all()
    assert store.values[:, 1].isnan().all()
    assert not store.keys[:, [0, 2, 3]].isnan().any()


def test_the_census_finds_a_leak_and_a_double_owner():
    book = PageBook(4, 4)
    pages = book.allocate(2)
    book.check_integrity([pages])
    with pytest.raises(GenerationError, match=rf"wrong counts on pages \[{pages[1]}\]"):
        book.check_integrity([pages[:1]])
    with pytest.raises(GenerationError, match="wrong counts"):
        book.check_integrity([pages, pages])
    book.free.append(pages[0])
    with pytest.raises(GenerationError, match=rf"lost or doubly free pages \[{pages[0]}\]"):
        book.check_integrity([pages])


@pytest.mark.parametrize(("num_pages", "page_size"), [(0, 16), (4, 0)])
def test_a_book_needs_pages(num_pages, page_size):
    with pytest.raises(GenerationError, match="must be at least 1"):
        PageBook(num_pages, page_size)


def test_a_page_without_owner_cannot_be_shared_or_released():
    book = PageBook(2, 4)
    with pytest.raises(AssertionError):
        book.retain([0])
    with pytest.raises(AssertionError):
        book.release([0])
