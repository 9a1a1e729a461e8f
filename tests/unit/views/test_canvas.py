"""Axes as people read them."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_multiverse.views.canvas import from_zero, grid, log_horizontally, save


@pytest.mark.parametrize("values", [[0.99, 1.08], [0, 0], [3, 300]])
def test_an_axis_from_zero_has_room_above_the_largest_value(values: list[float], tmp_path: Path) -> None:
    figure, ((axis,),) = grid(1, 1, width=4, row_height=3)
    axis.plot([1, 2], values, "o")
    from_zero(axis)
    low, high = axis.get_ylim()
    assert low == 0 and high > 1.04 * max(values)
    save(figure, tmp_path / "a.png")


def test_a_logarithmic_axis_has_plain_numbers(tmp_path: Path) -> None:
    figure, ((axis,),) = grid(1, 1, width=4, row_height=3)
    axis.plot([50, 270], [1, 2])
    log_horizontally(axis)
    figure.canvas.draw()
    labels = {label.get_text() for label in axis.get_xticklabels()}
    assert {"50", "100", "200"} <= labels
    assert not any(label.get_text() for label in axis.get_xticklabels(minor=True))
    save(figure, tmp_path / "a.png")
