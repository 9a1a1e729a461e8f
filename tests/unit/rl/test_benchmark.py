"""The benchmarks: both ways of laying answers out are the same update; rollouts are what the bare engine answers."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import rl_rollouts
from benchmarks.rl_shared_prefix import Options, measure, shape_of
from tests.unit.rl.runs import make_start


def test_a_tree_and_a_row_per_answer_are_one_update() -> None:
    o = Options(prompt=96, answer=64, group_size=4, updates=4, dtype="float32", tiny=True)
    rows, tree = (measure(o, shape_of(o), share=share) for share in (False, True))
    assert tree["loss"] == pytest.approx(rows["loss"], rel=1e-5)
    assert tree["grad_norm"] == pytest.approx(rows["grad_norm"], rel=1e-4)
    assert (rows["rows"], tree["rows"]) == ("4 x 256", "1 x 384")


def test_rollouts_are_the_answers_of_the_bare_engine(tmp_path: Path) -> None:
    start, config = make_start(tmp_path), tmp_path / "run.yaml"
    config.write_text(
        "checkpoint: {save: unused}\npolicy: {seq_length: 96}\n"
        "rollout: {group_size: 3, sampling: {max_tokens: 12, temperature: 1.0}}\n"
    )
    found = rl_rollouts.measure(
        rl_rollouts.Options(
            init_from=str(start / "model"), input=str(start / "rows.jsonl"), run_config=config, rounds=2,
            dtype="float32", prompts_per_step=4,
        )
    )  # fmt: skip
    assert found["same_answers"] == 1 and 12 < found["tokens"] <= 4 * 3 * 12
