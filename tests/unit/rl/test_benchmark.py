"""The benchmark of shared prompts: both ways of laying answers out are the same update."""

from __future__ import annotations

import pytest

from benchmarks.rl_shared_prefix import Options, measure, shape_of


def test_a_tree_and_a_row_per_answer_are_one_update() -> None:
    o = Options(prompt=96, answer=64, group_size=4, updates=4, dtype="float32", tiny=True)
    rows, tree = (measure(o, shape_of(o), share=share) for share in (False, True))
    assert tree["loss"] == pytest.approx(rows["loss"], rel=1e-5)
    assert tree["grad_norm"] == pytest.approx(rows["grad_norm"], rel=1e-4)
    assert (rows["rows"], tree["rows"]) == ("4 x 256", "1 x 384")
