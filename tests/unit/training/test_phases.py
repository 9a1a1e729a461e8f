"""Where the time of a step goes, which rank is slow, and a bar that tears no line."""

from __future__ import annotations

import io
import json
import logging
import re
import sys
from collections import deque
from pathlib import Path

import pytest
import torch

from megatron_multiverse.progress import step_bar
from megatron_multiverse.training import phases
from megatron_multiverse.training.phases import PhaseClock
from megatron_multiverse.training.stragglers import straggler_note
from megatron_multiverse.training.trainer import train
from tests.clocks import CLOCKED, TestClock

from .synthetic import SyntheticLoader, config


class Terminal(io.StringIO):
    """A standard error that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_each_phase_lasts_until_the_next_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(phases, "time", time := TestClock())
    clock = PhaseClock(torch.device("cpu"))
    forward = clock.around_forward(lambda seconds: time.sleep(seconds) or seconds)
    for _ in range(2):
        assert forward(2.0) == 2.0
        time.sleep(0.5)
        forward(2.0)
        time.sleep(0.5)
        clock.begin("optimizer")
        time.sleep(0.25)
        clock.end()
        time.sleep(10.0)  # between two steps: no phase
    assert clock.read(2) == {"forward_s": 4.0, "backward_s": 1.0, "optimizer_s": 0.25}
    forward(1.0)
    clock.end()
    clock.reset()
    assert clock.read(0) == {}


class SlowEvent:
    """A CUDA event of a device that is done with nothing until it is waited for. Each is one second after the last."""

    made, waits = 0, 0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        SlowEvent.made += 1
        self.at = SlowEvent.made

    def query(self) -> bool:
        return SlowEvent.waits > 0

    def synchronize(self) -> None:
        SlowEvent.waits += 1

    def elapsed_time(self, end: SlowEvent) -> float:
        return 1e3 * (end.at - self.at)


def test_on_a_gpu_only_reading_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", SlowEvent)
    clock = PhaseClock(torch.device("cuda"))
    for _ in range(3):
        for phase in ("forward", "backward", "forward", "backward", "optimizer"):
            clock.begin(phase)
        clock.end()
    assert SlowEvent.waits == 0
    assert clock.read(3) == {"forward_s": 2.0, "backward_s": 2.0, "optimizer_s": 1.0} and SlowEvent.waits == 3
    clock.begin("forward")
    clock.end()
    assert clock._ended == deque() and clock.read(1) == {"forward_s": 1.0}  # done steps keep no events


def test_the_phases_of_a_run_fit_into_its_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that goes on by one at each look, so that phases that leave looks out are found."""
    time = TestClock(tick=1.0)
    for module in CLOCKED:
        monkeypatch.setattr(module, "time", time)
    train(config(tmp_path, **{"log.log_interval": 2}), SyntheticLoader())
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if row["kind"] == "train"]
    assert len(rows) == 3
    for row in rows:
        found = [row[name] for name in ("data_wait_s", "forward_s", "backward_s", "optimizer_s")]
        assert min(found) > 0 and 0.5 * row["step_time_s"] < sum(found) <= row["step_time_s"]
        assert "grad_reduce_s" not in row  # one process has nothing to add up


def test_the_slowest_rank_is_named() -> None:
    names = [("left", 0), ("left", 0), ("right", 0), ("right", 0)]
    note = straggler_note([1.0, 1.02, 1.31, 0.98], names, 10.0)
    assert note and "rank 2 on right is slow: 1.31 s a step" in note and "30 % above the median of 1.01 s" in note
    assert straggler_note([1.0, 1.02, 1.05, 0.98], names, 10.0) is None
    assert straggler_note([0.0, 0.0, 0.0, 0.0], names, 10.0) is None


def test_pipeline_stages_may_differ() -> None:
    stages = [("host", 0), ("host", 0), ("host", 1), ("host", 1)]
    assert straggler_note([1.0, 1.0, 3.0, 3.1], stages, 10.0) is None
    assert "rank 0 on" in (straggler_note([1.5, 1.0, 3.0, 3.1], stages, 10.0) or "")


@pytest.mark.parametrize("handled", [True, False])
def test_log_lines_stay_whole_above_the_bar(monkeypatch: pytest.MonkeyPatch, handled: bool) -> None:
    terminal, root = Terminal(), logging.getLogger()
    monkeypatch.setattr(sys, "stderr", terminal)
    handler = logging.StreamHandler(terminal)
    handler.setFormatter(logging.Formatter("log: %(message)s"))
    monkeypatch.setattr(root, "handlers", [handler] if handled else [])
    monkeypatch.setattr(root, "level", logging.INFO)
    with step_bar(4, 1, shown=True) as advance:
        advance()
        logging.getLogger("some.module").info("step 2/4")
        advance()
    assert root.handlers == ([handler] if handled else [])
    assert "training:" in terminal.getvalue() and "3/4" in terminal.getvalue()
    if handled:
        assert "log: step 2/4" in re.split(r"[\r\n]", terminal.getvalue())


@pytest.mark.parametrize("stream", [io.StringIO(), Terminal()])
def test_no_bar_without_a_terminal_or_on_other_ranks(monkeypatch: pytest.MonkeyPatch, stream: io.StringIO) -> None:
    monkeypatch.setattr(sys, "stderr", stream)
    with step_bar(4, 0, shown=not stream.isatty()) as advance:
        advance()
    assert stream.getvalue() == ""
