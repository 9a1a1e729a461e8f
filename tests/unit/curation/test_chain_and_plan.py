"""Chains in numbered lines, groups of steps that wait for one another, and plans over lines."""

from __future__ import annotations

import itertools
import random

import pytest

from megatron_multiverse.curation.chain import cut_chain
from megatron_multiverse.curation.plan import (
    Group,
    PlanBlock,
    arrange,
    build_plan,
    build_steps,
    drop_outermost,
    flatten_plan,
    plan_blocks,
    refill,
)
from megatron_multiverse.curation.trees import flatten, plain_text, walk

TEXT = "\n\nFirst line.  \n  Second, indented.\n\n" + "A sentence of some words. " * 40 + "\nLast\n"


def test_lines_cover_the_chain_but_for_white_space() -> None:
    chain = cut_chain(TEXT)
    assert chain.slice(1, 2) == "First line.  \n  Second, indented."
    assert chain.slice(1, chain.num_lines) == TEXT.strip()
    assert chain.num_lines == 2 + 40 + 1, "the long line is cut at its sentences"
    gaps = [TEXT[end:start] for (_, end), (start, _) in itertools.pairwise(chain.spans)]
    assert not "".join(gaps).strip()
    assert chain.numbered().startswith("[1] First line.\n[2] Second, indented.\n[3] A sentence of some words.\n")
    assert cut_chain(" \n ").num_lines == 0


@pytest.mark.parametrize(
    ("needs", "blocks", "how"),
    [
        ({}, [[["1"], ["2"], ["3"], ["4"]]], "parallel"),
        ({"2": ["1"]}, [[["1", "2"], ["3"], ["4"]]], "chained"),
        ({"2": ["1"], "4": ["3"]}, [[["1", "2"], ["3", "4"]]], "chained"),
        # No tree holds these two: 4 waits for some of its neighbours only.
        ({"3": ["1"], "4": ["1", "2"]}, [[["1"], ["2"]], [["3"], ["4"]]], "split"),
        ({"3": ["1"], "4": ["2"]}, [[["1"], ["2"]], [["3"], ["4"]]], "split"),
        ({"2": ["1"], "3": ["2"], "4": ["3"]}, [[["1"]], [["2"]], [["3"]], [["4"]]], "sequential"),
    ],
)
def test_groups_are_arranged_as_a_tree_can_hold_them(
    needs: dict[str, list[str]], blocks: list[list[list[str]]], how: str
) -> None:
    assert arrange(Group("subtask", ("1", "2", "3", "4"), needs)) == (blocks, how)


@pytest.mark.parametrize("seed", range(200))
def test_whatever_a_step_needs_comes_before_it(seed: int) -> None:
    rng = random.Random(seed)
    members = tuple(str(k) for k in range(rng.randint(2, 7)))
    needs = {m: [n for n in members[:k] if rng.random() < 0.3] for k, m in enumerate(members)}
    blocks, _ = arrange(Group("subtask", members, needs))
    assert [m for block in blocks for path in block for m in path] == list(members), "text order stays"
    done: set[str] = set()
    for block in blocks:
        for path in block:
            known = set(done)
            for member in path:
                assert set(needs[member]) <= known
                known.add(member)
        done |= {m for path in block for m in path}


def steps_of(chain_lines: int) -> tuple:
    steps = build_steps([("a", 1), ("b", 3), ("c", 5), ("d", 9)], 1, chain_lines)
    inner = build_steps([("b1", 3), ("b2", 4)], 3, 4, "2.")
    return (steps[0], type(steps[1])("2", "b", 3, 4, inner), *steps[2:])


def test_plans_refill_the_original_text() -> None:
    text = "\n".join(f"line {k}" for k in range(1, 13))
    chain = cut_chain(text)
    groups = [Group("case_study", ("2", "3", "4")), Group("subtask", ("2.1", "2.2"))]
    plan = build_plan(steps_of(12), groups)
    before, block = plan.parts
    assert before == (1, 2) and isinstance(block, PlanBlock) and block.lines == (3, 12)
    assert [b.kind for b in plan_blocks(plan.parts)] == ["case_study", "subtask"]
    filled = refill(plan.parts, chain)
    assert plain_text(filled) == text
    assert [b.outlines for _, b in walk(filled)] == [("b", "c", "d"), ("b1", "b2")]
    for gone in ([0], [1], [0, 1], []):
        assert refill(flatten_plan(plan.parts, gone), chain) == flatten(filled, gone)
    assert drop_outermost(plan.parts, [0]) == ((1, 12),)
    assert drop_outermost(plan.parts, []) == plan.parts


@pytest.mark.parametrize(
    ("starts", "message"),
    [
        ([], "must begin with line 1, not with nothing"),
        ([("a", 2)], "must begin with line 1, not with 2"),
        ([("a", 1), ("b", 1)], "step 2 begins with line 1; it must be one of 2 to 9"),
        ([("a", 1), ("b", 10)], "step 2 begins with line 10; it must be one of 2 to 9"),
    ],
)
def test_steps_that_do_not_cover_the_chain_are_refused(starts: list[tuple[str, int]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_steps(starts, 1, 9)
