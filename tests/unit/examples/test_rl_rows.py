"""The task of examples/rl: what splitting costs and saves, counted before anything is trained."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[3] / "examples"
sys.path[:0] = [str(EXAMPLES / "quickstart"), str(EXAMPLES / "rl")]

import rows  # noqa: E402
from task import check_answer, render_undecided, sample_problem  # noqa: E402

from megatron_multiverse.data.tokenizers import build_tokenizer  # noqa: E402
from megatron_multiverse.structure import Block, parse_text  # noqa: E402


def test_splitting_pays_in_one_family_alone_and_where_it_pays_is_worth_knowing() -> None:
    steps = rows.count_steps(build_tokenizer("HuggingFaceTokenizer", rows.TOKENIZER), count=20)
    assert steps["wide"].block < 0.5 * steps["wide"].sequential
    assert steps["narrow"].block > 1.4 * steps["narrow"].sequential
    means = rows.policies(steps, narrow_share=0.8)
    best = means.pop("where it pays")
    assert min(means.values()) > 1.2 * best
    assert best == pytest.approx(0.8 * steps["narrow"].sequential + 0.2 * steps["wide"].block)


def test_responses_fork_at_random_in_either_family_and_are_right() -> None:
    rng, options = random.Random(3), rows.RowOptions(output_dir=Path("unused"), sft_rows=60)
    written = list(rows.sft_rows(rng, options))
    kinds = {("B = " in row["prompt"], "<Parallel>" in row["response"]) for row in written}
    assert len(kinds) == 4
    for fork in (False, True):
        problem = sample_problem(rng, **rows.FAMILIES["wide"])
        _, response = render_undecided(problem, fork=fork)
        assert check_answer(problem, response)
        assert sum(isinstance(part, Block) for part in parse_text(response)) == fork


def test_prompts_name_their_family(tmp_path: Path) -> None:
    rows.write(tmp_path / "rows.jsonl", rows.prompts(random.Random(1), 40, 0.8, "held_out"))
    read = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert {row["family"] for row in read} == {"narrow", "wide"} and all(row["answer"] for row in read)
