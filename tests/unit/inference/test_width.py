"""How wide steps are: what a step's time teaches, how rows are shared, and that width changes no answer."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_multiverse.inference.width import StepLoad, StepTime, _nearest_prices, allot
from megatron_multiverse.structure import Tag

from .test_engine import goal, tree_requests
from .toy import (
    EOS,
    TEXT,
    NullModel,
    ScriptedSampler,
    ToyModel,
    ask,
    assert_drained,
    jumping_clock,
    largest_difference,
    toy_engine,
)

LAW = (4.77e-3, 5.8e-6, 1.26e-8, 2.6e-5)
"""Seconds of a step, of a row, of a token that a row sees, of a prompt token."""


def seconds(load: StepLoad, law: tuple[float, ...] = LAW) -> float:
    return law[0] + sum(price * amount for price, amount in zip(law[1:], load, strict=True))


def random_load(rng: random.Random, *, prompts: bool = True) -> StepLoad:
    rows = rng.randint(1, 256)
    return StepLoad(rows, rows * rng.randint(100, 16000), rng.choice([0, 0, 500, 2000]) if prompts else 0)


def test_the_time_of_a_step_is_learned_while_steps_run():
    rng, time = random.Random(0), StepTime()
    for _ in range(60):
        load = random_load(rng)
        time.observe(load, seconds(load) * rng.uniform(0.97, 1.03))
    for _ in range(40):
        load = random_load(rng)
        assert time.predict(load) == pytest.approx(seconds(load), rel=0.05)


def test_a_change_is_followed_and_what_was_not_seen_again_is_remembered():
    rng, time = random.Random(1), StepTime()
    for _ in range(200):
        load = random_load(rng)
        time.observe(load, seconds(load))
    slower = (2 * LAW[0], *LAW[1:])
    for _ in range(100):  # a long time without a prompt
        load = random_load(rng, prompts=False)
        time.observe(load, seconds(load, slower))
    for load in (StepLoad(128, 10**6, 0), StepLoad(128, 10**6, 2000)):
        assert time.predict(load) == pytest.approx(seconds(load, slower), rel=0.1)


def test_no_price_is_negative_and_predictions_are_of_the_prices():
    """Long steps with one prompt each, alike in everything, then many rows without a prompt: the first cannot say what
    a step, a row and a prompt token cost apart. Before, a negative price of rows made the sum right, was left out of
    the prediction alone, and so never mended."""
    for seed in range(20):
        rng, time = random.Random(seed), StepTime()
        for _ in range(200):
            load = StepLoad(rng.randint(1, 4), rng.randint(1000, 8000), rng.randint(1350, 1450))
            time.observe(load, seconds(load) * rng.uniform(0.95, 1.05))
        for _ in range(100):
            rows = rng.randint(40, 60)
            load = StepLoad(rows, rows * rng.randint(6000, 7000), rng.choice([0, 0, 64]))
            time.observe(load, seconds(load) * rng.uniform(0.95, 1.05))
            assert min(time.prices) >= 0
        for _ in range(20):
            rows = rng.randint(40, 60)
            load = StepLoad(rows, rows * 6500, 0)
            assert time.predict(load) == pytest.approx(seconds(load), rel=0.15)


def test_prices_without_negative_ones_lie_nearly_as_near_as_any():
    rng = np.random.default_rng(0)
    for _ in range(200):
        steps = rng.random((30, 4)) * rng.choice([0.01, 1.0], 4)
        information, theta = steps.T @ steps, rng.normal(size=4)

        got = _nearest_prices(theta, information)
        assert (got >= 0).all() and (theta.min() < 0 or np.array_equal(got, theta))
        candidates = [prices for prices in (got, *faces(theta, information)) if (prices >= 0).all()]
        distances = [(prices - theta) @ information @ (prices - theta) for prices in candidates]
        assert distances[0] <= 1.2 * min(distances) + 1e-12


def faces(theta, information):
    """The nearest prices for each choice of which are zero."""
    for kept in itertools.product([False, True], repeat=4):
        rest = np.array(kept)
        prices = np.zeros(4)
        if rest.any():
            prices[rest] = np.linalg.solve(information[np.ix_(rest, rest)], information[rest] @ theta)
        yield prices


def test_one_step_that_waited_for_something_else_is_hardly_believed():
    time, load = StepTime(), StepLoad(32, 32000, 0)
    for _ in range(100):
        time.observe(load, seconds(load))
    time.observe(load, 2.0)
    assert time.predict(load) < 1.1 * seconds(load)


@settings(max_examples=60, deadline=None)
@given(
    wanted=st.lists(st.lists(st.integers(1, 20000), max_size=9), max_size=9),
    max_rows=st.integers(1, 40),
    prompt=st.integers(0, 3000),
    target=st.sampled_from([0.001, 0.006, 0.008, 0.02, 0.1, float("inf")]),
)
def test_shares_are_fair_and_no_wider_than_rows_and_time_allow(wanted, max_rows, prompt, target):
    time = StepTime()
    rng = random.Random(0)
    for _ in range(60):
        load = random_load(rng)
        time.observe(load, seconds(load))
    limits = {"max_rows": max_rows, "max_prompt": 2048, "min_prompt": 16}
    widths = allot(wanted, **limits, prompt=prompt, time=time, target=target)
    assert sum(widths.rows) <= max_rows
    assert 16 <= widths.prompt <= 2048
    runs = [k for k, visible in enumerate(wanted) if visible]
    assert all(widths.rows[k] <= len(wanted[k]) for k in range(len(wanted)))
    assert [k for k in runs if widths.rows[k]] == runs[:max_rows]
    visible = [length for k, width in enumerate(widths.rows) for length in wanted[k][:width]]
    load = StepLoad(len(visible), sum(visible), min(prompt, widths.prompt))
    if any(width > 1 for width in widths.rows):
        assert time.predict(load) <= target * (1 + 1e-9)
    # Where only rows are short, no request has two rows more than another that wants more.
    free = allot(wanted, **limits).rows
    short = [free[k] for k in runs if free[k] < len(wanted[k])]
    assert not short or max(free) <= min(short) + 1
    assert sum(free) == min(max_rows, sum(map(len, wanted)))


@pytest.mark.usefixtures("overlap")
@pytest.mark.parametrize(("target", "max_rows"), [(0.001, 32), (2.0, 5), (2.0, 32)])
def test_widths_that_change_at_any_step_change_no_answer(target, max_rows):
    scripts, requests = tree_requests(7, 3)
    sampler = ScriptedSampler(scripts)
    engine = toy_engine(
        ToyModel(),
        sampler=sampler,
        page_size=4,
        max_rows=max_rows,
        max_step_tokens=64,
        token_latency_target_ms=target,
        clock=jumping_clock(3),
    )
    results = engine.generate(requests)
    assert any(result.blocks for result in results)
    assert largest_difference(engine.runner.model, sampler, requests, results) < 1e-9
    assert_drained(engine)


def fork(paths: int, length: int) -> dict[tuple[tuple[int, int], ...], list[int]]:
    script = {(): [*goal(paths), *[TEXT] * 4, EOS]}
    return script | {((0, k),): [TEXT] * length + [int(Tag.END_PATH)] for k in range(paths)}


def test_a_fork_holds_up_neither_who_runs_nor_who_waits():
    """Rows of a step are shared by requests, not by branches; a fork that wants them all waits for none."""
    scripts = [fork(9, 30), {(): [TEXT] * 20 + [EOS]}, {(): [TEXT] * 20 + [EOS]}, {(): [TEXT] * 8 + [EOS]}]
    engine = toy_engine(NullModel(), sampler=ScriptedSampler(scripts), max_rows=4)
    widest = 0
    launch = engine.runner.launch

    def counted(plan):
        nonlocal widest
        widest = max(widest, len(plan.lengths))
        return launch(plan)

    engine.runner.launch = counted
    for k in range(3):
        engine.add_request(ask([TEXT] * 5, sample=k))
    steps, ended = 0, {}
    while engine.has_work:
        steps += 1
        if steps == 70:  # by now the fork alone has all the rows
            engine.add_request(ask([TEXT] * 5, sample=3))
        ended.update({result.request_id: (steps, result) for result in engine.step()})
    assert [ended[k][0] for k in (1, 2, 3)] == [21, 21, 78]
    assert widest == 4
    assert ended[0][0] > 78
    assert sum(span.tokens for span in ended[0][1].timeline) >= 9 * 31
    assert_drained(engine)


def test_a_target_that_nothing_meets_still_serves_everyone():
    scripts = [fork(4, 6), fork(4, 6)]
    engine = toy_engine(NullModel(), sampler=ScriptedSampler(scripts), token_latency_target_ms=1e-6, page_size=8)
    results = engine.generate([ask([TEXT] * 40, sample=k) for k in range(2)])
    assert [result.finish_reason for result in results] == ["stop", "stop"]
    # 6 and 7 pages of 40 prompt tokens and the fork's beginnings go in single pages; one branch at a time.
    assert all(result.decode_steps >= 4 * 7 for result in results)
    assert_drained(engine)


def test_paused_branches_are_not_drawn_as_running():
    scripts = [fork(3, 20), {(): [TEXT] * 10 + [EOS]}]
    engine = toy_engine(NullModel(), sampler=ScriptedSampler(scripts), max_rows=3)
    engine.add_request(ask([TEXT], sample=0))
    results = {}
    for step in range(100):
        if step == 40:  # all three paths run; one of them makes room
            engine.add_request(ask([TEXT], sample=1))
        results.update((result.request_id, result) for result in engine.step())
    spans = {name: [s for s in results[0].timeline if s.branch == name] for name in ("1", "2", "3")}
    assert [len(spans[name]) for name in spans] == [1, 1, 2]
    assert all(span.tokens == span.end - span.start for parts in spans.values() for span in parts)
    assert [sum(span.tokens for span in parts) for parts in spans.values()] == [21] * 3
    assert (spans["3"][0].end, spans["3"][1].start) == (40, 48)  # until the first path ends
