from __future__ import annotations

import logging

import pytest

from megatron_multiverse import progress
from megatron_multiverse.progress import ProgressLine


def test_without_a_terminal_the_log_says_how_far_it_is(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(progress, "PLAIN_LINE_EVERY_S", 0.0)
    with caplog.at_level(logging.INFO), ProgressLine("convert", 1000, done=500) as line:
        line.show(500)  # an earlier run's part alone says nothing about the speed
        assert not caplog.messages
        line.show(line.done + 250)
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith(" 75.0 %  ") and "MB/s  ETA " in caplog.messages[0]


def test_items_are_counted_where_they_have_a_name(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(progress, "PLAIN_LINE_EVERY_S", 0.0)
    with caplog.at_level(logging.INFO), ProgressLine("preprocess", 100, items="docs") as line:
        line.show(100, 7)
    assert "100.0 %  7 docs  " in caplog.messages[0] and caplog.messages[0].endswith("ETA 0 s")
