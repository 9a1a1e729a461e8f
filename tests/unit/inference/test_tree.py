"""Without a model: pool and tree against lists of lists."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_multiverse.errors import GenerationError
from megatron_multiverse.inference.pages import PagePool
from megatron_multiverse.inference.tree import Node, PageTree


def make_pool(num_pages: int, page_size: int) -> PagePool:
    return PagePool(num_pages, page_size, num_layers=2, num_kv_heads=1, head_dim=1, dtype=torch.float64, debug=True)


class Oracle:
    """A tree whose cache holds token numbers, so the contents of every node can be read back."""

    def __init__(self, num_pages: int, page_size: int) -> None:
        self.pool = make_pool(num_pages, page_size)
        self.tree = PageTree(self.pool)
        self.want: dict[Node, list[int]] = {}
        self.position: dict[Node, int] = {}
        self.counter = 0

    def write(self, slots: np.ndarray) -> list[int]:
        numbers = list(range(self.counter, self.counter + len(slots)))
        self.counter += len(slots)
        target = torch.from_numpy(np.asarray(slots, dtype=np.int64))
        data = torch.tensor(numbers, dtype=torch.float64)
        self.pool.keys[:, target, 0, 0] = data
        self.pool.values[:, target, 0, 0] = -data
        return numbers

    def root(self) -> Node:
        node = self.tree.root()
        self.want[node], self.position[node] = [], 0
        return node

    def append(self, node: Node, count: int) -> bool:
        if self.tree.append_cost(node, count) > self.pool.num_free:
            with pytest.raises(GenerationError, match="pages asked for"):
                self.pool.allocate(self.pool.num_free + 1)
            return False
        self.want[node] += self.write(self.tree.append(node, count))
        self.position[node] += count
        return True

    def fork(self, node: Node, count: int) -> list[Node]:
        if self.tree.fork_cost(node, count) > self.pool.num_free:
            return []
        before = self.pool.copied_tokens
        kids = self.tree.fork(node, count)
        assert self.pool.copied_tokens - before == count * (len(self.want[node]) % self.pool.page_size)
        for kid in kids:
            self.want[kid], self.position[kid] = list(self.want[node]), self.position[node]
            assert kid.base == len(self.want[node])
        return kids

    def join(self, node: Node, one_by_one: bool) -> None:
        kids = list(node.children)
        if not kids or any(kid.children for kid in kids):
            return
        length, position = len(self.want[node]), max(self.position[kid] for kid in kids)
        own = sorted(number for kid in kids for number in self.want[kid][length:])
        for group in [[kid] for kid in kids] if one_by_one else [kids]:
            cost = self.tree.join_cost(node, group)
            if cost > self.pool.num_free:
                if group[0] is kids[0]:
                    return
                self.free(node)  # halfway and stuck: give the tree up
                return
            before, free = self.pool.copied_tokens, self.pool.num_free
            self.tree.join(node, group)
            assert free - self.pool.num_free == cost
            copied = self.pool.copied_tokens - before
            assert copied <= (2 * len(group) + 1) * self.pool.page_size
            assert copied == 0 or self.pool.page_size > 1
            for kid in group:
                self.free(kid)
        # Indices below the parent's length stay in place; behind them the order is free.
        got = self.read(node)
        assert got[:length] == self.want[node]
        assert sorted(got[length:]) == own
        self.want[node], self.position[node] = got, position

    def free(self, node: Node) -> None:
        for kid in list(node.children):
            self.free(kid)
        self.tree.free(node)
        del self.want[node], self.position[node]

    def read(self, node: Node) -> list[int]:
        slots = torch.from_numpy(node.slots.copy())
        assert torch.equal(self.pool.keys[0, slots], self.pool.keys[1, slots])
        assert torch.equal(self.pool.keys[:, slots], -self.pool.values[:, slots])
        return [int(x) for x in self.pool.keys[0, slots, 0, 0].tolist()]

    def check(self) -> None:
        self.pool.check_integrity([node.pages for node in self.want])
        for node, want in self.want.items():
            assert self.read(node) == want
            assert node.length == len(want)
            assert node.next_pos == self.position[node]
            assert len(node.pages) == -(-node.length // self.pool.page_size)


ACTIONS = st.tuples(st.sampled_from(["append", "fork", "join", "free", "root"]), st.integers(0, 99), st.integers(1, 40))


@settings(max_examples=300, deadline=None)
@given(page_size=st.sampled_from([1, 4, 16, 64]), actions=st.lists(ACTIONS, min_size=5, max_size=60))
def test_random_histories_match_lists(page_size, actions):
    oracle = Oracle(max(8, 400 // page_size), page_size)
    oracle.root()
    for action, which, amount in [("append", 0, 7), *actions]:
        nodes = list(oracle.want)
        node = nodes[which % len(nodes)] if nodes else oracle.root()
        if action == "append" and not node.children:
            oracle.append(node, amount)
        elif action == "fork" and not node.children:
            for kid in oracle.fork(node, amount % 4 + 1):
                oracle.append(kid, which % 20 + 1)
        elif action == "join":
            oracle.join(node, one_by_one=amount % 2 == 0)
        elif action == "free":
            oracle.free(node)
        elif action == "root" and len(nodes) < 12:
            oracle.root()
        oracle.check()
    for node in [node for node in oracle.want if node.parent is None]:
        oracle.free(node)
    assert oracle.pool.num_free == oracle.pool.num_pages
    oracle.pool.check_integrity([])


def test_a_join_with_too_few_ragged_tokens_gives_up_one_whole_page():
    oracle = Oracle(20, 16)
    root = oracle.root()
    oracle.append(root, 16)
    first, second = oracle.fork(root, 2)
    oracle.append(first, 2)
    oracle.append(second, 32)
    before = oracle.pool.copied_tokens
    oracle.join(root, one_by_one=True)
    # After the first path fourteen slots of the open page are free and the second has no ragged token to fill them.
    assert oracle.pool.copied_tokens - before == 2 + 16
    oracle.check()


def test_a_slot_that_is_not_written_yet_is_followed_instead_of_copied():
    pool = make_pool(8, 4)
    tree = PageTree(pool)
    root = tree.root()
    pool.expect(tree.append(root, 2).tolist())
    kids = tree.fork(root, 2)
    assert sorted(pool.alias_pairs()) == sorted(
        (int(root.slots[i]), int(kid.slots[i])) for kid in kids for i in range(2)
    )
    pool.settle()
    assert pool.alias_pairs() == []


def test_a_copy_of_a_copy_follows_the_slot_that_is_computed():
    pool = make_pool(8, 4)
    tree = PageTree(pool)
    root = tree.root()
    pool.expect(tree.append(root, 2).tolist())
    (kid,) = tree.fork(root, 1)
    (grandkid,) = tree.fork(kid, 1)
    want = [(int(root.slots[i]), int(node.slots[i])) for i in range(2) for node in (kid, grandkid)]
    assert sorted(pool.alias_pairs()) == sorted(want)


def test_freed_pages_are_poisoned_and_the_dummy_is_not():
    pool = make_pool(2, 4)
    pages = pool.allocate(2)
    pool.keys[:] = 1.0
    pool.release(pages)
    assert pool.keys[:, :8].isnan().all()
    assert (pool.keys[:, pool.dummy_slot :] == 1).all()


def test_the_census_finds_a_leak_and_a_double_owner():
    pool = make_pool(4, 4)
    pages = pool.allocate(2)
    pool.check_integrity([pages])
    with pytest.raises(GenerationError, match=rf"wrong counts on pages \[{pages[1]}\]"):
        pool.check_integrity([pages[:1]])
    with pytest.raises(GenerationError, match="wrong counts"):
        pool.check_integrity([pages, pages])
    pool._free.append(pages[0])
    with pytest.raises(GenerationError, match=rf"lost or doubly free pages \[{pages[0]}\]"):
        pool.check_integrity([pages])


@pytest.mark.parametrize(("num_pages", "page_size"), [(0, 16), (4, 0)])
def test_a_pool_needs_pages(num_pages, page_size):
    with pytest.raises(GenerationError, match="must be at least 1"):
        make_pool(num_pages, page_size)


def test_a_page_without_owner_cannot_be_shared_or_released():
    pool = make_pool(2, 4)
    with pytest.raises(AssertionError):
        pool.retain([0])
    with pytest.raises(AssertionError):
        pool.release([0])
