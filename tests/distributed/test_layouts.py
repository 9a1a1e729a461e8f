"""However a model is spread over ranks, it is trained alike: losses and gradient norms are those of one process."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from .runs import LAYOUTS, STEPS, numbers, train_on

TOLERANCE = 1e-5
"""Relative; what the order of float32 sums leaves is 100 times smaller."""
NAMES = list(LAYOUTS)


@pytest.mark.parametrize("name", NAMES)
def test_every_layout_trains_as_one_process_does(
    name: str, half_way: Callable[[str], Path], reference: dict[str, list[float]], data: Path, tmp_path: Path
) -> None:
    """Half of a run, and the other half from the checkpoint of another layout: weights, moments, data and schedule."""
    ranks, settings = LAYOUTS[name]
    other = NAMES[NAMES.index(name) - 1]
    shutil.copytree(half_way(other), tmp_path / "run")
    train_on(ranks, data, tmp_path / "run", **settings)
    for run, steps in ((half_way(name), STEPS // 2), (tmp_path / "run", STEPS)):
        found = numbers(run)
        assert len(found["loss"]) == steps
        assert found["loss_tokens"] == reference["loss_tokens"][:steps]
        for column in ("loss", "grad_norm"):
            assert found[column] == pytest.approx(reference[column][:steps], rel=TOLERANCE)
