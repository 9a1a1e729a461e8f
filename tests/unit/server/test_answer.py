"""Answers in the order of their text while branches write at the same time."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import pytest

from megatron_multiverse.inference import Result
from megatron_multiverse.server.answer import AnswerTree, ThoughtSplitter
from megatron_multiverse.structure import Tag
from tests.unit.inference.toy import NullModel, SoupSampler, ask, toy_engine
from tests.unit.server.running import tokenizer


def generate(seed: int, requests: int) -> tuple[list[Result], dict[int, AnswerTree[int]], dict[int, list[int]]]:
    """Answers of random tags, nested blocks, broken headers and spent budgets, each followed by a tree."""
    engine = toy_engine(NullModel(), sampler=SoupSampler(seed), max_rows=5, page_size=16)
    trees: dict[int, AnswerTree[int]] = defaultdict(lambda: AnswerTree(int(Tag.END_PATH), int))
    taken: dict[int, list[int]] = defaultdict(list)

    def hear(request: int, branch: str, ids: list[int]) -> None:
        trees[request].push(branch, ids)
        taken[request] += trees[request].take()

    asked = [ask([30], sample=k, max_tokens=40 + 60 * k) for k in range(requests)]
    results = engine.generate(asked, on_token=hear)
    return results, trees, taken


@pytest.mark.parametrize("seed", range(12))
def test_pieces_add_up_to_the_answer_and_come_early(seed: int) -> None:
    results, trees, taken = generate(seed, 8)
    for k, result in enumerate(results):
        before_the_end = len(taken[k])
        trees[k].finish()
        taken[k] += trees[k].take()
        assert taken[k] == result.token_ids
        assert before_the_end == len(result.token_ids), "all was known before the end"
        assert trees[k].num_blocks == len(result.blocks)


def test_a_path_waits_for_those_before_it_only() -> None:
    end = int(Tag.END_PATH)
    tree = AnswerTree(end, int)
    tree.push("", [30])
    for name in ("1", "2", "3"):
        tree.push(name, [40 + int(name)])
    assert tree.take() == [30, 41]
    tree.push("2", [end])
    tree.push("3", [50])
    assert tree.take() == []
    tree.push("1", [51])
    assert tree.take() == [51]
    tree.push("1", [end])
    assert tree.take() == [end, 42, end, 43, 50]
    tree.push("3", [end])
    tree.push("", [31])
    assert tree.take() == [end, 31]


def test_names_that_come_again_are_new_branches() -> None:
    end = int(Tag.END_PATH)
    tree = AnswerTree(end, int)
    tree.push("", [30])
    first = tree.push("1", [41])
    inner = tree.push("1.1", [42])
    tree.push("1.1", [end])
    tree.push("1", [43, end])
    tree.push("", [31])
    second = tree.push("1", [44])
    again = tree.push("1.1", [45])
    assert (first.block, inner.block, second.block, again.block) == (1, 2, 3, 4)
    assert first is not second and inner is not again
    tree.finish()
    assert tree.take() == [30, 41, 42, end, 43, end, 31, 44, 45]


def split(text: str, step: int) -> tuple[str, str]:
    splitter, parts = ThoughtSplitter(tokenizer(), split=True), []
    ids = tokenizer().tokenize(text)
    for k in range(0, len(ids), step):
        parts.append(splitter.push(ids[k : k + step]))
    parts.append(splitter.finish())
    return "".join(part[0] for part in parts), "".join(part[1] for part in parts)


@pytest.mark.parametrize(
    ("text", "content", "thought"),
    [
        ("<Think>\na é 1\n</Think>\nAnswer: é", "\nAnswer: é", "\na é 1\n"),
        ("no thought", "no thought", ""),
        ("x<Think>never ends é", "x", "never ends é"),
        ("</Think>a<Think>b<Think>c</Think>d", "</Think>ad", "b<Think>c"),
    ],
)
def test_thoughts_are_told_from_content(text: str, content: str, thought: str) -> None:
    for step in (1, 2, 100):
        assert split(text, step) == (content, thought)


def test_without_splitting_all_is_content() -> None:
    splitter: Any = ThoughtSplitter(tokenizer(), split=False)
    text = "<Think>\na\n</Think>\nb"
    assert splitter.push(tokenizer().tokenize(text)) == (text, "") and splitter.finish() == ("", "")
