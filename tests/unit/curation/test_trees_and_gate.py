"""Trees of text and blocks, and the gate that flattens blocks which do not pay."""

from __future__ import annotations

import itertools
import random

import pytest

from megatron_multiverse.curation.gate import block_gains, flatten_losing
from megatron_multiverse.curation.token_counts import RoughTokens, count_plain, tree_document
from megatron_multiverse.curation.trees import (
    ANNOUNCEMENT,
    announce,
    flatten,
    parse_think,
    plain_text,
    shape,
    think,
    walk,
    without_announcements,
)
from megatron_multiverse.structure import Block, Parts, measure
from tests.unit.curation.random_trees import trajectory

COUNTER = RoughTokens()
SHORT = Block(("say a", "say b"), (("a",), ("b",)), "said a and b")


@pytest.mark.parametrize("seed", range(20))
def test_trees_are_written_and_read_back(seed: int) -> None:
    parts = trajectory(seed)
    assert without_announcements(announce(parts)) == parts
    assert parse_think(think(parts)) == parts
    assert think(parts).count(ANNOUNCEMENT) == len(list(walk(parts)))
    assert ANNOUNCEMENT not in plain_text(announce(parts))


def test_an_announcement_that_stands_elsewhere_is_text() -> None:
    parts: Parts = (f"{ANNOUNCEMENT}\nmore", SHORT, ANNOUNCEMENT)
    assert plain_text(parts) == f"{ANNOUNCEMENT}\nmore\na\nb\n{ANNOUNCEMENT}"
    assert without_announcements((f"x {ANNOUNCEMENT}", SHORT)) == (f"x {ANNOUNCEMENT}", SHORT)


@pytest.mark.parametrize("seed", range(20))
def test_flattening_keeps_the_text_and_the_other_blocks(seed: int) -> None:
    parts = trajectory(seed)
    blocks = [block for _, block in walk(parts)]
    gone = {k for k in range(len(blocks)) if random.Random(seed).random() < 0.5 or k == 0}
    left = flatten(parts, gone)
    assert plain_text(left) == plain_text(parts)
    kept = [block.conclusion for k, block in enumerate(blocks) if k not in gone]
    assert [block.conclusion for _, block in walk(left)] == kept
    assert parse_think(think(left)) == left, "neighbouring texts are joined, as they are read back"


def test_flattening_nothing_changes_nothing() -> None:
    parts = trajectory(1)
    assert flatten(parts, ()) == parts
    assert flatten_losing(parts, COUNTER, 0.0) == (parts, list(range(len(list(walk(parts))))))


def critical(parts: Parts) -> int:
    return measure(tree_document(parts, COUNTER)).critical_tokens


@pytest.mark.parametrize("seed", range(40))
def test_no_choice_of_blocks_is_shorter(seed: int) -> None:
    """The plain reference: the shortest critical path over all subsets of blocks."""
    parts = trajectory(seed, words=60)
    count = len(list(walk(parts)))
    if count > 7:
        pytest.skip("too many subsets")
    subsets = itertools.chain.from_iterable(itertools.combinations(range(count), n) for n in range(count + 1))
    shortest = min(critical(flatten(parts, gone)) for gone in subsets)
    left, kept = flatten_losing(parts, COUNTER, 1.0)
    # Rough tokens are rounded up at each border, so a block that saves a step or two may look like none.
    assert shortest <= critical(left) <= shortest + 2 * count
    assert len(kept) == len(list(walk(left)))
    assert [b.conclusion for _, b in walk(left)] == [[b for _, b in walk(parts)][k].conclusion for k in kept]


def test_gain_is_the_text_over_the_steps_of_the_block() -> None:
    long = "word " * 400
    block = Block(("one", "two"), ((long,), (long,)), "done")
    parts: Parts = ("before", block, "after")
    (gain,) = block_gains(parts, tree_document(parts, COUNTER), COUNTER)
    flat = flatten(parts, {0})
    saved = count_plain(parts, COUNTER) - critical(parts)
    assert gain.sequential_tokens - gain.critical_tokens == pytest.approx(saved, abs=4)
    assert gain.net_gain > 1.8
    assert critical(flat) == count_plain(parts, COUNTER)
    assert flatten_losing(parts, COUNTER, 1.0) == (parts, [0])
    assert flatten_losing(("x", SHORT), COUNTER, 1.0) == (("x\na\nb",), [])


def test_shape_is_what_a_rewritten_block_has_to_keep() -> None:
    nested = Block(("p", "q"), (("x", SHORT, "y"), ("z",)), "c")
    assert shape(nested) == ((((), ()),), ())
    assert shape(SHORT) == ((), ())
