"""The numbers of a step, of answers made by hand."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from megatron_multiverse.evaluation.samples import Sample
from megatron_multiverse.evaluation.scores import score
from megatron_multiverse.rl.report import answer_columns, answer_numbers
from megatron_multiverse.structure import acceleration_ratio, saved_share


def test_an_answer_that_its_budget_ended_is_truncated_and_not_malformed() -> None:
    def result(finish_reason: str, **malformed: int) -> Any:
        return SimpleNamespace(
            token_ids=[1] * 10, critical_tokens=5, blocks=[], malformed=Counter(malformed), dropped_tokens=0,
            finish_reason=finish_reason,
        )  # fmt: skip

    results = [result("stop"), result("length", forced_close=1), result("stop", fork_refused=1), result("stop", gap=1)]
    group = SimpleNamespace(
        number=0, is_settled=False, prompt=SimpleNamespace(family=""), results=results, rewards=np.ones(4),
        correct=np.ones(4),
    )  # fmt: skip
    batch: Any = SimpleNamespace(results=results, groups=[group])
    found = answer_numbers(answer_columns(batch))
    assert (found["malformed"], found["truncated"]) == (0.25, 0.25)


def test_evaluation_and_training_name_the_same_numbers_of_an_answer_alike() -> None:
    tokens, critical = np.array([100.0, 30.0, 0.0]), np.array([25.0, 30.0, 0.0])
    zeros = np.zeros(3)
    columns = dict.fromkeys(("reward", "right", "forks", "malformed", "truncated", "dropped_tokens", "group"), zeros)
    columns |= {"length": tokens, "critical_length": critical, "right": zeros > 0, "settled": zeros > 0}
    trained = answer_numbers({**columns, "family": np.array([""] * 3)})
    assert trained["saved_share"] == pytest.approx((0.75 + 0 + 0) / 3) == saved_share(tokens, critical)
    samples = [
        Sample(
            text="", finish_reason="stop", tokens=int(length), critical_tokens=int(chain), decode_steps=0, blocks=0,
            paths=0, malformed={}, seconds=1.0, task="t", problem="p", thinking="parallel", budget=None, seed=seed,
            concurrency=1, gold="", answer=None, correct=False, prompt="",
        )
        for seed, (length, chain) in enumerate(zip(tokens, critical, strict=True))
    ]  # fmt: skip
    evaluated = vars(score(samples))
    assert evaluated["acceleration_ratio"] == pytest.approx((4 + 1 + 0) / 3) == acceleration_ratio(tokens, critical)
    alike = evaluated.keys() & trained.keys()
    assert {"accuracy", "num_parallel", "trigger_ratio", "malformed", "truncated"} <= alike
    assert {name: evaluated[name] for name in alike} == pytest.approx({name: trained[name] for name in alike})
