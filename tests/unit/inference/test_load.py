"""The simulated load runs on the real scheduler, and its law of step times is that of the measured points."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks.load.law import POINTS, StepLaw
from benchmarks.load.simulator import POLICIES, Simulation, series, summary
from benchmarks.load.users import TRACES, Phase


def test_the_law_meets_the_measured_points():
    law = StepLaw()
    assert (law.prices > 0).all()
    for point in POINTS:
        assert 1000 * law.seconds(point.amounts) == pytest.approx(point.milliseconds, rel=0.07), point.what


def test_a_short_trace_is_served_within_the_promise_and_leaves_nothing_behind():
    phases = Phase(2, 6), Phase(2, 0)
    trace = replace(TRACES[1], phases=phases, document=600, path_tokens=30, serial_tokens=60, think=0.02)
    never, _, by_time = (Simulation(trace, policy, seed=1).run() for policy in POLICIES)
    slow, fast = summary(never), summary(by_time)
    assert fast["requests_within_slo"] == 1
    assert fast["tokens_per_second"] > 1.5 * slow["tokens_per_second"]  # users ask again sooner
    assert fast["step_p99_ms"] < 50 and sum(series(by_time)["rows"]) > sum(series(never)["rows"])
    for request in by_time.served:
        assert request.times == sorted(request.times) and len(request.times) == len(request.tokens)
    engine = by_time.engine
    assert not engine.has_work and engine.book.available == engine.book.num_pages
    assert engine.scheduler.step_time is not None
    assert engine.scheduler.step_time.prices[3] == pytest.approx(StepLaw().prices[4], rel=0.1)
