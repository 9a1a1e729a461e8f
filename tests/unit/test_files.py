"""Small files are whole or not there."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path

import pytest

from megatron_multiverse import files


@pytest.mark.parametrize("name", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_content_and_no_litter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    target = tmp_path / "value.json"
    files.write_json_atomic(target, {"a": 1})

    def fails(*args: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, name, fails)
    with pytest.raises(OSError, match="disk full"):
        files.write_json_atomic(target, {"a": 2})
    assert json.loads(target.read_text()) == {"a": 1}
    assert list(tmp_path.iterdir()) == [target]


def test_a_value_that_json_cannot_hold_does_not_touch_the_file(tmp_path: Path) -> None:
    target = tmp_path / "value.json"
    files.write_text_atomic(target, "old")
    with pytest.raises(TypeError):
        files.write_json_atomic(target, {"a": object()})
    assert target.read_text() == "old"


def test_a_figure_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plt = pytest.importorskip("matplotlib.pyplot")
    plt.close("all")  # of other tests
    target = tmp_path / "new" / "loss.png"
    files.save_figure(plt.figure(), target, dpi=20)
    old = target.read_bytes()
    assert old.startswith(b"\x89PNG")

    def fails(self: object, path: Path, **options: object) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", fails)
    with pytest.raises(OSError, match=r"loss\.png"):
        files.save_figure(plt.figure(), target, dpi=20)
    assert target.read_bytes() == old and list(target.parent.iterdir()) == [target]
    assert not plt.get_fignums()


def test_a_figure_has_the_format_of_its_name(tmp_path: Path) -> None:
    plt = pytest.importorskip("matplotlib.pyplot")
    for name, start in {"a.svg": b"<?xml", "b.pdf": b"%PDF", "c": b"\x89PNG"}.items():
        files.save_figure(plt.figure(), tmp_path / name, dpi=20)
        assert (tmp_path / name).read_bytes().startswith(start)


def test_texts_in_a_figure_are_no_formulas(tmp_path: Path) -> None:
    """Tokens of mathematics: matplotlib stops at a formula that it does not know, and warns of each missing glyph."""
    plt = pytest.importorskip("matplotlib.pyplot")
    figure, axis = plt.subplots(layout="constrained")
    axis.set_title(r"$\fr{1}$")
    axis.text(0.5, 0.5, r"$a_$ 算")
    axis.set_xticks([0, 1], labels=["$x_{1$", "$"])
    axis.plot([1, 2], [1, 1e4], label="$\\foo$")
    axis.set_yscale("log")
    axis.legend()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        files.save_figure(figure, tmp_path / "a.png", dpi=20)
    assert (tmp_path / "a.png").stat().st_size > 0
