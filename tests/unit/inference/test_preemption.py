"""A request that steps back gives the same answer later: every key it computes again equals that of one forward."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from megatron_multiverse.structure import Tag

from .test_engine import goal
from .toy import (
    EOS,
    NEWLINE,
    TEXT,
    VOCAB_SIZE,
    ScriptedSampler,
    ToyModel,
    ask,
    assert_drained,
    force_preemption,
    largest_difference,
    random_prompt,
    random_script,
    toy_engine,
)

MODEL = ToyModel(1)


@pytest.mark.parametrize("max_step_tokens", range(20, 27))
@pytest.mark.parametrize("page_size", [1, 64])
def test_a_join_and_the_fork_after_it_are_fed_again_in_one_step(page_size, max_step_tokens):
    """The join copies slots that this step only writes, and the fork copies those copies."""
    end = [Tag.END_CONCLUSION, NEWLINE, Tag.END_PARALLEL]
    script = {
        (): [TEXT, *goal(1), *end, TEXT, *goal(1), *[TEXT] * 3, *end, TEXT, EOS],
        ((0, 0),): [TEXT + 1] * 20 + [Tag.END_PATH],
        ((1, 0),): [TEXT + 2] * 6 + [Tag.END_PATH],
    }
    script = {path: [int(token) for token in ids] for path, ids in script.items()}
    sampler = ScriptedSampler([script])
    engine = toy_engine(MODEL, page_size=page_size, max_step_tokens=max_step_tokens, sampler=sampler)
    request = ask([TEXT, TEXT + 1, TEXT + 2], max_tokens=500)
    engine.add_request(request)
    results, preempted = [], False
    while engine.has_work:
        results += engine.step()
        for state in engine.scheduler.active:
            blocks = state.root.blocks
            if not preempted and len(blocks) == 2 and len(blocks[1].kids[0].ids) > 6:
                preempted = True
                force_preemption(engine)
    assert preempted
    assert results[0].finish_reason == "stop"
    assert largest_difference(MODEL, sampler, [request], results) < 1e-9
    assert_drained(engine)


@pytest.mark.usefixtures("overlap")
@pytest.mark.parametrize("max_step_tokens", [1, 8, 16, 32, 64])
@pytest.mark.parametrize("page_size", [1, 16, 64])
def test_random_trees_preempted_twice_compute_the_same_keys(page_size, max_step_tokens):
    for seed in range(2):
        rng = random.Random(1000 * max_step_tokens + 10 * page_size + seed)
        script = random_script(rng, depth=rng.choice([1, 2]), blocks=2, most_paths=3, text=rng.choice([2, 8]))
        request = ask(random_prompt(rng), max_tokens=3000)
        sampler = ScriptedSampler([script])
        engine = toy_engine(
            MODEL,
            page_size=page_size,
            num_pages=9600 // page_size,
            max_rows=rng.choice([2, 8, 32]),
            max_step_tokens=max_step_tokens,
            sampler=sampler,
        )
        engine.add_request(request)
        results, steps, preempt_at = [], 0, set(rng.sample(range(10, 120), 2))
        while engine.has_work:
            results += engine.step()
            steps += 1
            if steps in preempt_at and engine.scheduler.active:
                force_preemption(engine)
        assert results[0].finish_reason == "stop"
        assert results[0].preemptions == sum(at < steps for at in preempt_at)
        assert largest_difference(MODEL, sampler, [request], results) < 1e-9
        assert_drained(engine)


@pytest.mark.parametrize("at", [3, 10, 24])
def test_the_timeline_shows_what_was_written_before_a_preemption_too(at):
    script = {
        (): [TEXT] * 5 + [*goal(2), *[TEXT] * 4, EOS],
        **{((0, k),): [TEXT] * 9 + [int(Tag.END_PATH)] for k in range(2)},
    }
    request = ask([TEXT] * 5, max_tokens=300)
    calm = toy_engine(MODEL, sampler=ScriptedSampler([script])).generate([request])[0]
    engine = toy_engine(MODEL, sampler=ScriptedSampler([script]))
    engine.add_request(request)
    results = []
    for step in range(500):
        if step == at:
            force_preemption(engine)
        results += engine.step()
        if results:
            break
    assert results[0].preemptions == 1
    assert sum(span.tokens for span in results[0].timeline) == sum(span.tokens for span in calm.timeline)
    assert all(span.start < span.end for span in results[0].timeline)


def _prompt(seed: int, length: int) -> list[int]:
    return random.Random(seed).choices(range(TEXT, VOCAB_SIZE), k=length)


def _ended(engine) -> list[int]:
    """Requests in the order in which they end."""
    ended = []
    while engine.has_work:
        ended += [result.request_id for result in engine.step()]
    return ended


@pytest.mark.usefixtures("overlap")
def test_requests_start_by_priority_and_then_in_the_order_in_which_they_came():
    engine = toy_engine(MODEL, max_rows=1)
    for seed, priority in enumerate((0, 5, -1, 0, 5, -1)):
        engine.add_request(replace(ask(_prompt(seed, 6), max_tokens=3, ignore_eos=True), priority=priority))
    assert _ended(engine) == [2, 5, 0, 3, 1, 4]
    assert_drained(engine)


@pytest.mark.usefixtures("overlap")
def test_a_prompt_of_higher_priority_does_not_wait_for_a_long_one():
    engine = toy_engine(MODEL, page_size=4, max_step_tokens=8)
    engine.add_request(ask(_prompt(1, 200), max_tokens=1))
    for _ in range(3):
        engine.step()
    first = engine.num_steps
    urgent = replace(ask(_prompt(2, 8), max_tokens=1), priority=-1)
    engine.add_request(urgent)
    results = []
    while not results:
        results = engine.step()
    assert results[0].request_id == 1 and engine.num_steps - first <= 3
    assert results[0].token_ids == toy_engine(MODEL).generate([urgent])[0].token_ids
    assert _ended(engine) == [0]
    assert_drained(engine)


@pytest.mark.usefixtures("overlap")
@pytest.mark.parametrize("order", [(0, 0, 1), (0, 1, 0), (1, 0, 0)])
def test_the_least_priority_steps_back_when_pages_run_out(order):
    """Whenever it came; and its answer is the same."""
    requests = [
        replace(ask(_prompt(seed, 8), max_tokens=24, ignore_eos=True), priority=priority)
        for seed, priority in enumerate(order)
    ]
    engine = toy_engine(MODEL, page_size=4, num_pages=17)
    results = engine.generate(requests)
    assert [result.preemptions > 0 for result in results] == [priority == 1 for priority in order]
    for request, result in zip(requests, results, strict=True):
        assert result.token_ids == toy_engine(MODEL).generate([request])[0].token_ids
    assert_drained(engine)
