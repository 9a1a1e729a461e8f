"""Pictures of evaluations hold their labels and names whole, however many and long these are."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_multiverse.evaluation import plots
from megatron_multiverse.evaluation.compare import compare_runs
from megatron_multiverse.evaluation.samples import Sample
from megatron_multiverse.evaluation.scores import score_settings
from tests.unit.evaluation.test_scores import sample


def answers(tasks: list[str], budgets: list[int | None], concurrency: int = 1) -> list[Sample]:
    return [
        sample(p, 0, p < 2, task=task, budget=budget, thinking=how, critical_tokens=k, seconds=k / 9,
               tokens=(1 + p) * k, concurrency=concurrency)
        for task in tasks for how in ("parallel", "sequential") for k, budget in enumerate(budgets, 1) for p in range(3)
    ]  # fmt: skip


@pytest.mark.parametrize("tasks", [["t"], ["gpqa_diamond", "math500", "aime24"]])
@pytest.mark.parametrize("budgets", [[None], [1024, 16384, None]])
def test_nothing_is_cut_off(
    tasks: list[str], budgets: list[int | None], tmp_path: Path, whole_figures: list[str]
) -> None:
    samples = answers(tasks, budgets)
    plots.draw_scores(score_settings(samples), samples, tmp_path / "report.png")
    plots.draw_comparison(compare_runs(samples, samples), tmp_path / "comparison.png")
    assert whole_figures == ["report", "comparison"]


def test_lines_go_from_budget_to_budget_also_where_a_larger_one_took_less_time() -> None:
    """Seconds scatter: points in their order would not tell which budget is which."""
    from matplotlib.figure import Figure

    samples = answers(["t"], [100, 200, None])
    slow = [one for one in samples if one.budget == 100 and one.thinking == "parallel"]
    for one in slow:
        object.__setattr__(one, "seconds", 5.0)
    axis = Figure().subplots()
    plots._draw_budgets(axis, score_settings(samples), "seconds", "mean seconds of an answer")
    first, second = axis.get_lines()
    assert list(first.get_xdata()) == pytest.approx([5, 2 / 9, 3 / 9])
    assert list(second.get_xdata()) == pytest.approx([1 / 9, 2 / 9, 3 / 9])
    assert [text.get_text() for text in axis.texts] == ["100", "200", "none"] * 2
