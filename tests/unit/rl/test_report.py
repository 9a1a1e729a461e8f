"""The numbers of a step, of answers made by hand."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any

import numpy as np

from megatron_multiverse.rl.report import answer_columns, answer_numbers


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
