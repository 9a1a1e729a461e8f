"""However a model is spread over ranks, it is trained alike: losses and gradient norms are those of one process."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from .conftest import run_in_one_process
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
    assert found["valid"][-1:] == pytest.approx(reference["valid"], rel=TOLERANCE)


def test_an_output_layer_of_its_own_is_trained_alike(data: Path, tmp_path: Path) -> None:
    """As larger models have: on the last stage alone, and without a sum of gradients with the embedding's."""
    untied = {"model.share_embeddings_and_output_weights": False}
    expected = run_in_one_process(data, tmp_path / "reference", **untied)
    ranks, settings = LAYOUTS["tensor and pipeline"]
    found = train_on(ranks, data, tmp_path / "run", **settings, **untied)
    for column in ("loss", "grad_norm", "valid"):
        assert found[column] == pytest.approx(expected[column], rel=TOLERANCE)


def test_one_process_goes_on_where_several_ranks_stopped(
    half_way: Callable[[str], Path], reference: dict[str, list[float]], data: Path, tmp_path: Path
) -> None:
    """The other engine, and a vocabulary without the padding that two tensor parallel ranks need."""
    shutil.copytree(half_way("tensor"), tmp_path / "run")
    train_on(1, data, tmp_path / "run", engine="one_process")
    found = numbers(tmp_path / "run")
    for column in ("loss", "grad_norm"):
        assert found[column] == pytest.approx(reference[column], rel=TOLERANCE)
    assert found["valid"][-1:] == pytest.approx(reference["valid"], rel=TOLERANCE)


def test_bf16_goes_on_bit_for_bit(data: Path, tmp_path: Path) -> None:
    """The float32 weights that only the optimizer has are what a checkpoint holds."""
    bf16 = {"dtype": "bf16", "eval_iters": 1}
    straight = train_on(2, data, tmp_path / "straight", **bf16, **LAYOUTS["tensor"][1])
    train_on(2, data, tmp_path / "cut", train_iters=STEPS // 2, **bf16, **LAYOUTS["tensor"][1])
    train_on(2, data, tmp_path / "cut", **bf16, **LAYOUTS["tensor"][1])
    assert numbers(tmp_path / "cut")["loss"] == straight["loss"]
    assert straight["loss"][-1] < straight["loss"][0]
