"""Answers that share their prompt: every token stands where it stood in its own document, and sees the same."""

from __future__ import annotations

import random

import numpy as np
import pytest

from megatron_multiverse.structure import Layout, lay_out, pack_layouts, parse, share_prefix, visible_matrix
from tests.unit.inference.toy import NEWLINE, TEXT, VOCAB, random_script
from tests.unit.rl.answers import written


def documents(seed: int) -> tuple[list[Layout], int]:
    rng = random.Random(seed)
    prompt = [rng.randrange(48) for _ in range(rng.randint(1, 12))]
    answers = [written(random_script(rng, depth=2, blocks=2, most_paths=3, text=4)) for _ in range(rng.randint(1, 4))]
    answers[rng.randrange(len(answers))] = rng.choice([[], [TEXT, NEWLINE], answers[0]])
    return [lay_out(parse([*prompt, *ids], VOCAB, prompt_length=len(prompt), strict=False)) for ids in answers], len(
        prompt
    )


@pytest.mark.parametrize("seed", range(12))
def test_a_shared_prefix_changes_no_position_and_no_visibility(seed: int) -> None:
    layouts, prompt = documents(seed)
    tree = share_prefix(layouts, prompt)
    sees, start = visible_matrix(tree), prompt
    assert tree.num_tokens == prompt + sum(part.num_tokens - prompt for part in layouts)
    assert sees.sum() == tree.num_visible_pairs
    assert sorted(tree.r) == list(range(tree.num_tokens))
    trained = tree.loss_mask()
    for part in layouts:
        end = start + part.num_tokens - prompt
        own = [*range(prompt), *range(start, end)]
        assert np.array_equal(tree.position_ids[own], part.position_ids)
        assert np.array_equal(sees[np.ix_(own, own)], visible_matrix(part))
        others = np.setdiff1d(np.arange(prompt, tree.num_tokens), np.arange(start, end))
        assert not sees[np.ix_(range(start, end), others)].any()
        alone = part.loss_mask()[prompt:]
        if start > prompt and end > start:
            alone[0] = False  # what is before it in the row is another answer
        assert np.array_equal(trained[start:end], alone)
        start = end


def test_a_tree_can_be_packed_with_others() -> None:
    (layouts, prompt), (others, other_prompt) = documents(1), documents(2)
    trees = [share_prefix(layouts, prompt), share_prefix(others, other_prompt)]
    packed, border = pack_layouts(trees), trees[0].num_tokens
    sees = visible_matrix(packed)
    assert np.array_equal(sees[:border, :border], visible_matrix(trees[0]))
    assert np.array_equal(sees[border:, border:], visible_matrix(trees[1]))
    assert not sees[border:, :border].any() and sees.sum() == packed.num_visible_pairs
