"""Random trees: to text and back, and positions and visibility against slow definitions on the tree itself."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from megatron_multiverse.errors import StructureError
from megatron_multiverse.structure import (
    TAGS,
    Block,
    Document,
    Parts,
    StructureVocab,
    lay_out,
    measure,
    pack_layouts,
    padding_layout,
    parse,
    parse_text,
    render,
    visible_matrix,
)

CHARACTERS = [*TAGS, *map(chr, range(32, 127)), "\n"]
INDEX = {piece: k for k, piece in enumerate(CHARACTERS)}
VOCAB = StructureVocab.from_pieces(CHARACTERS)

WORDS = st.text(alphabet="ab <1:.>", max_size=4)


def trees(max_depth: int) -> st.SearchStrategy[Parts]:
    """Trajectories whose blocks nest at most `max_depth` deep."""
    if max_depth == 0:
        return st.lists(WORDS, min_size=1, max_size=1).map(tuple)
    inner = trees(max_depth - 1)
    blocks = st.integers(1, 3).flatmap(
        lambda n: st.builds(
            Block,
            outlines=st.tuples(*[WORDS] * n),
            paths=st.tuples(*[inner] * n),
            conclusion=WORDS,
        )
    )
    parts = st.lists(st.one_of(WORDS, blocks, blocks), min_size=1, max_size=3)
    # Two neighbouring strings are one text: keep a string only after a block or at the start.
    return parts.map(
        lambda row: (
            "",
            *(part for k, part in enumerate(row) if isinstance(part, Block) or (k and isinstance(row[k - 1], Block))),
        )
    )


def characters(text: str) -> list[int]:
    """One token per tag and per character."""
    return [INDEX[piece] for piece in re.findall("|".join([*TAGS, r"(?s:.)"]), text)]


@settings(max_examples=150, deadline=None)
@given(trees(4))
def test_random_trees_round_trip(parts: Parts) -> None:
    assert parse_text(render(parts)) == parts


def slow_visible(document: Document) -> np.ndarray:
    """By sets: no block may hold query and key in different paths."""
    n = document.num_tokens
    visible = np.tril(np.ones((n, n), dtype=bool))
    for _, block in document.walk():
        members = [set(range(path.start, path.end)) for path in block.paths]
        for path, sibling in itertools.permutations(members, 2):
            visible[np.ix_(sorted(path), sorted(sibling))] = False
    return visible


def slow_positions(visible: np.ndarray) -> list[int]:
    """One more than the largest position among the tokens that may come before."""
    positions = np.zeros(len(visible), dtype=int)
    for i in range(len(visible)):
        before = np.flatnonzero(visible[i, :i])
        positions[i] = positions[before].max(initial=-1) + 1
    return positions.tolist()


@settings(max_examples=60, deadline=None)
@given(trees(3), st.integers(0, 3))
def test_positions_and_labels_equal_the_slow_definitions(parts: Parts, prompt_length: int) -> None:
    ids = [CHARACTERS.index("q")] * prompt_length + characters(render(parts))
    document = parse(ids, VOCAB, prompt_length=prompt_length)
    layout = lay_out(document)
    visible = slow_visible(document)
    assert np.array_equal(visible_matrix(layout), visible)
    assert layout.position_ids.tolist() == slow_positions(visible)
    counts = measure(document)
    assert counts.critical_tokens == len(set(layout.position_ids[prompt_length:].tolist()))
    assert counts.blocks == sum(1 for _ in document.walk())


@settings(max_examples=50, deadline=None)
@given(st.lists(trees(2), min_size=1, max_size=3), st.integers(0, 5))
def test_packed_documents_never_see_each_other(rows: list[Parts], padding: int) -> None:
    layouts = [lay_out(parse(characters(render(parts)), VOCAB)) for parts in rows]
    pack = pack_layouts([*layouts, padding_layout(padding)])
    visible = visible_matrix(pack)
    start = 0
    for part in layouts:
        stop = start + part.num_tokens
        assert np.array_equal(visible[start:stop, start:stop], visible_matrix(part))
        assert not visible[start:stop, :start].any()
        assert np.array_equal(pack.position_ids[start:stop], part.position_ids)
        assert np.array_equal(pack.loss_mask()[start:stop], part.loss_mask())
        start = stop
    assert not pack.loss_mask()[start:].any()
    assert len(set(pack.r.tolist())) == pack.num_tokens
    assert pack.num_visible_pairs == visible.sum()


def test_visibility_survives_any_permutation() -> None:
    """Context parallelism moves tokens; index and r travel with them."""
    block = Block(("a", "b"), (("a", Block(("c",), (("d",),), "e")), ("f",)), "g")
    layout = lay_out(parse(characters(render(("x", block, "y"))), VOCAB))
    visible, r = visible_matrix(layout), layout.r
    order = np.random.default_rng(0).permutation(layout.num_tokens)
    moved = (order[None, :] <= order[:, None]) & (r[order][None, :] <= r[order][:, None])
    assert np.array_equal(moved, visible[np.ix_(order, order)])


def test_a_label_without_blank_is_text_side_only() -> None:
    text = render(("", Block(("a",), (("b",),), "c"))).replace("1: b", "1:b")
    assert parse_text(text)[1] == Block(("a",), (("b",),), "c")


def test_statistics_of_a_small_block() -> None:
    document = parse(characters(render(("x", Block(("a", "b"), (("cc",), ("d",)), "e")))), VOCAB)
    counts = measure(document)
    assert (counts.blocks, counts.paths, counts.depth) == (1, 2, 1)
    # A path is newline, tag, newline, "1: cc", newline, tag: 10 tokens and 9; they run beside each other.
    assert counts.num_tokens - counts.critical_tokens == 9
    assert counts.in_path_share == pytest.approx(19 / counts.num_tokens)


def test_real_trajectories_round_trip_byte_for_byte(samples_folder: Path) -> None:
    files = sorted(samples_folder.glob("*.xml"))
    for file in files:
        text = file.read_text(encoding="utf-8")
        assert render(parse_text(text, sample=file.name)) == text, file.name


def test_error_says_the_character() -> None:
    text = render(("x", Block(("a",), (("b",),), "c"))).replace("</Goal>\n", "</Goal>\n\n")
    with pytest.raises(StructureError) as caught:
        parse_text(text, sample="s1")
    assert caught.value.char_index == text.index("\n\n") + 1
    assert "sample s1" in str(caught.value)
