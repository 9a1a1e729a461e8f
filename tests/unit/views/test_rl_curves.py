"""Curves of reinforcement learning, drawn from what its runs report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_multiverse.errors import ConfigError, DataError
from megatron_multiverse.views import rl_curves
from megatron_multiverse.views.loss_curves import RunHistory, column, plot_loss
from megatron_multiverse.views.rl_curves import PANELS, by_family, plot_rl, with_present_names


def test_runs_are_drawn_with_steps_that_trained_nothing(tmp_path: Path) -> None:
    names = [name for names, _ in PANELS for name in names]
    for run in ("a", "b"):
        (tmp_path / run).mkdir()
        rows = [{"kind": "train", "step": step, **dict.fromkeys(names, step / 10)} for step in (1, 2, 3)]
        del rows[1]["entropy"], rows[1]["clip_share"]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / run / "metrics.jsonl").write_text(text, encoding="utf-8")
    plot_rl([tmp_path / "a", tmp_path / "b"], tmp_path / "rl.png", smooth=2)
    assert (tmp_path / "rl.png").stat().st_size > 20_000
    with pytest.raises(ConfigError, match="smooth"):
        plot_rl([tmp_path / "a"], tmp_path / "rl.png", smooth=0)
    with pytest.raises(DataError, match="does not exist"):
        plot_rl([tmp_path / "none"], tmp_path / "rl.png")


def figure_with(rows: list[dict[str, Any]], folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The figure of a run that reported these steps."""
    text = "".join(json.dumps({"kind": "train", **row}) + "\n" for row in rows)
    (folder / "metrics.jsonl").write_text(text, encoding="utf-8")
    drawn: list[Any] = []
    monkeypatch.setattr(rl_curves, "save_figure", lambda figure, *_, **__: drawn.append(figure))
    plot_rl([folder], folder / "rl.png")
    return drawn[0]


def notes_of(figure: Any) -> dict[tuple[str, ...], str]:
    """What is written into panels without values."""
    panels = zip([names for names, _ in PANELS], figure.axes, strict=True)
    return {names: axis.texts[0].get_text() for names, axis in panels if axis.texts}


def test_a_short_run_without_updates_is_still_readable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    updates = {"entropy", "logprob_drift", "clip_share"}
    names = [name for names, _ in PANELS for name in names if name not in updates]
    rows: list[dict[str, Any]] = [{"step": step, "targets": 0, **dict.fromkeys(names, 0.5)} for step in (1, 2, 3)]
    notes = notes_of(figure_with(rows, tmp_path, monkeypatch))
    assert notes.keys() == {("entropy",), ("logprob_drift", "clip_share")}
    assert all("no step had an update" in note for note in notes.values())
    rows[1] |= {"entropy": 0.25, "targets": 9}
    figure = figure_with(rows, tmp_path, monkeypatch)
    assert notes_of(figure) == {("logprob_drift", "clip_share"): "not recorded"}, "a step had an update"
    panels = dict(zip([names for names, _ in PANELS], figure.axes, strict=True))
    assert panels[("entropy",)].get_lines()[0].get_marker() == ".", "one value alone is no line"
    assert all(float(tick).is_integer() for tick in figure.axes[-1].get_xticks())
    reward, accuracy = panels["reward", "accuracy"].get_lines()[:2]
    assert reward.get_linewidth() > accuracy.get_linewidth() and reward.get_alpha() < 1, "both are seen where equal"


def test_what_was_not_recorded_is_not_laid_on_updates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[dict[str, Any]] = [{"step": step, "reward": 0.5, "length": 9.0} for step in (1, 2)]
    empty = [names for names, _ in PANELS if not {"reward", "length"} & set(names)]
    assert notes_of(figure_with(rows, tmp_path, monkeypatch)) == dict.fromkeys(empty, "not recorded")
    rows[0]["targets"] = 0  # of the other step it is not known
    assert notes_of(figure_with(rows, tmp_path, monkeypatch)) == dict.fromkeys(empty, "not recorded")
    rows[1]["targets"] = 0
    notes = notes_of(figure_with(rows, tmp_path, monkeypatch))
    for names in (("trigger_ratio", "saved_share"), ("num_parallel",)):
        assert notes.pop(names) == "not recorded", "no update is needed for these"
    assert len(notes) == 2 and all("no step had an update" in note for note in notes.values())


def test_a_run_of_another_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"kind": "train", "step": 5, "loss": 1.0, "lr": 0.1}\n')
    with pytest.raises(DataError, match=r"is no run of reinforcement learning .* tools/plot_loss\.py"):
        plot_rl([tmp_path], tmp_path / "rl.png")
    (tmp_path / "metrics.jsonl").write_text('{"kind": "train", "step": 5, "loss": -1.0, "lr": 0.1, "reward": 1.0}\n')
    with pytest.raises(DataError, match=r"is a run of reinforcement learning, .* tools/plot_rl\.py draws"):
        plot_loss([tmp_path], tmp_path / "loss.png")
    assert not (tmp_path / "loss.png").exists()


def test_families_take_the_place_of_what_is_reported_of_all() -> None:
    record = {"accuracy": 1.0, "accuracy/wide": 1.0, "accuracy/narrow": 1.0, "reward": 1.0}
    histories = [RunHistory("a", {1: record}, {}, []), RunHistory("b", {1: {"accuracy": 0.5}}, {}, [])]
    assert by_family("accuracy", histories) == ["accuracy/narrow", "accuracy/wide"]
    assert by_family("reward", histories) == ["reward"]


def test_a_run_that_a_later_version_continued_is_one_curve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = {1: {"reward": 1.0, "acceleration_ratio": 0.25}, 2: {"reward": 1.0, "saved_share": 0.5}}
    history = RunHistory("a", steps, {}, [])
    assert column(with_present_names(history).train, "saved_share") == [0.25, 0.5]
    rows = [{"kind": "train", "step": step, **record} for step, record in steps.items()]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    drawn = []
    monkeypatch.setattr(rl_curves, "column", lambda train, name: drawn.append((name, column(train, name))) or [0.0] * 2)
    plot_rl([tmp_path], tmp_path / "rl.png")
    assert ("saved_share", [0.25, 0.5]) in drawn
