"""What is asked, in which order, and what answers earn."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from megatron_multiverse.config import RewardConfig, TaskConfig
from megatron_multiverse.data.tokenizers import MultiverseTokenizer, build_tokenizer
from megatron_multiverse.errors import CheckpointError, DataError, TrainingError
from megatron_multiverse.rl.prompts import Prompt, Prompts, read_prompts
from megatron_multiverse.rl.rewards import Graded, Grader, speed_bonus

from .runs import TOKENIZER


@pytest.fixture(scope="module")
def tokenizer() -> MultiverseTokenizer:
    return build_tokenizer("HuggingFaceTokenizer", TOKENIZER)


def rows_file(folder: Path, rows: list[dict[str, Any]]) -> TaskConfig:
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return TaskConfig(input=str(file), prompt_key="question", prompt_suffix="parallel")


def test_each_epoch_has_all_prompts_in_another_order_and_goes_on_where_it_stood(
    tmp_path: Path, tokenizer: MultiverseTokenizer
) -> None:
    task = rows_file(tmp_path, [{"question": f"{k} + 1?", "answer": k + 1} for k in range(9)])
    prompts = Prompts(task, tokenizer, seed=1)
    drawn = [prompts.draw() for _ in range(27)]
    assert [number for number, _ in drawn] == list(range(27))
    epochs = [[prompt.gold for _, prompt in drawn[start : start + 9]] for start in (0, 9, 18)]
    assert all(sorted(map(int, epoch)) == list(range(1, 10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert drawn[0][1].text.endswith("in parallel before answering.") and drawn[0][1].row["answer"] in range(1, 10)
    again = Prompts(task, tokenizer, seed=1)
    again.load_state_dict({**prompts.state_dict(), "drawn": 5})
    assert [again.draw() for _ in range(22)] == drawn[5:]
    other = rows_file(tmp_path, [{"question": "2 + 2?", "answer": "4"}])
    with pytest.raises(CheckpointError, match="other prompts"):
        Prompts(other, tokenizer, seed=1).load_state_dict(prompts.state_dict())
    for rows, words in (
        ([{"question": " ", "answer": 1}], "row 1"),
        ([{"question": "a"}], "'answer'"),
        ([], "no rows"),
    ):
        with pytest.raises(DataError, match=words):
            Prompts(rows_file(tmp_path, rows), tokenizer, seed=1)


def test_right_answers_are_what_responses_state(tmp_path: Path, tokenizer: MultiverseTokenizer) -> None:
    answers = [r"$\boxed{5}$", r"\boxed{3} and \boxed{4}", 5.0, 0.5, 7, " x = 2 "]
    task = rows_file(tmp_path, [{"question": f"{k}?", "answer": answer} for k, answer in enumerate(answers)])
    found = [prompt.gold for prompt in read_prompts(task, tokenizer)]
    assert found == ["5", "3, 4", "5", "0.5", "7", "x = 2"]


def test_prompts_have_families_where_a_column_says_so(tmp_path: Path, tokenizer: MultiverseTokenizer) -> None:
    rows = [{"question": "1 + 1?", "answer": 2, "kind": "short"}, {"question": "2 + 2?", "answer": 4, "kind": 7}]
    task = dataclasses.replace(rows_file(tmp_path, rows), family_key="kind")
    assert {prompt.family for prompt in read_prompts(task, tokenizer)} == {"short", "7"}
    with pytest.raises(DataError, match=r"no text in column 'kin'.*--task\.family_key= divides into no families"):
        read_prompts(dataclasses.replace(task, family_key="kin"), tokenizer)


def graded(text: str, gold: str, critical: int = 10, **result: Any) -> Graded:
    values = {"critical_tokens": critical, "finish_reason": "stop", "malformed": {}} | result
    return Graded(Prompt("", [], gold, {}), text, SimpleNamespace(**values))  # type: ignore[arg-type]


def test_right_answers_earn_by_words_or_by_value_and_extras_by_weight() -> None:
    answers = [
        graded("<Think>\n1\n</Think>\n\nAnswer: A = 3; B = 4", "A = 3; B = 4"),
        graded("Answer: A = 3; B = 5", "A = 3; B = 4"),
        graded("no answer", "A = 3; B = 4", finish_reason="length"),
    ]
    correct, rewards = Grader(RewardConfig(correct="exact", extra={"format": 0.5})).grade(answers, 0)
    assert correct.tolist() == [1, 0, 0] and rewards.tolist() == [1.5, 0.5, 0]
    halves = [graded(r"\boxed{\frac{1}{2}}", "0.5"), graded(r"\boxed{0.6}", "0.5")]
    assert Grader(RewardConfig(correct="math")).grade(halves, 0)[0].tolist() == [1, 0]
    with pytest.raises(TrainingError, match="finite"):
        Grader(RewardConfig(correct="tests.unit.rl.test_prompts_rewards:nan")).grade(answers, 0)


def nan(answer: Graded) -> float:
    return float("nan")


def test_speed_pays_right_answers_alone_within_its_cap_and_is_annealed() -> None:
    lengths, right = np.array([50.0, 100.0, 150.0, 5.0]), np.array([True, True, True, False])
    np.testing.assert_allclose(speed_bonus(lengths, right, 0.5, 0.2), [0.2, 0, -0.2, 0])
    np.testing.assert_allclose(speed_bonus(lengths, right, 0.2, 0.9), [0.1, 0, -0.1, 0])
    assert not speed_bonus(lengths, right & False, 0.5, 0.2).any() and not speed_bonus(lengths, right, 0.0, 0.2).any()
    config = RewardConfig(correct="exact", speed=0.4, speed_cap=0.9, speed_anneal_iters=100)
    answers = [graded("Answer: 1", "1", critical) for critical in (50, 150)]
    earned = [Grader(config).grade(answers, step)[1].tolist() for step in (0, 50, 100, 200)]
    np.testing.assert_allclose(earned, [[1.2, 0.8], [1.1, 0.9], [1, 1], [1, 1]])
