"""Faults of callers, callbacks and the model: one request suffers, the others and the engine go on."""

from __future__ import annotations

from collections import Counter

import pytest

from megatron_multiverse.errors import GenerationError
from megatron_multiverse.inference import CounterSampler, Request
from megatron_multiverse.structure import Tag, parse

from .test_engine import MODEL, answers, tree_requests
from .toy import (
    TEXT,
    VOCAB,
    VOCAB_SIZE,
    ScriptedSampler,
    ToyModel,
    ask,
    assert_drained,
    force_preemption,
    structure_positions,
    toy_engine,
)


def plain(number: int = 0, tokens: int = 20) -> Request:
    return ask([TEXT, TEXT + number], max_tokens=tokens, ignore_eos=True)


def serve(engine):
    results = {}
    while engine.has_work:
        results.update((result.request_id, result) for result in engine.step())
    return results


# -- ids the model does not know -----------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", [-1, VOCAB_SIZE, 9999])
def test_prompt_ids_outside_the_vocabulary_are_refused_by_name(wrong):
    for engine in (toy_engine(vocab_size=VOCAB_SIZE), toy_engine()):
        running = engine.add_request(plain())
        engine.step()
        with pytest.raises(GenerationError, match=rf"prompt token 1 is {wrong}, .* 0 to {VOCAB_SIZE - 1}"):
            engine.add_request(ask([TEXT, wrong]))
        assert len(serve(engine)[running].token_ids) == 20
        assert_drained(engine)


# -- callbacks -----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("overlap")
@pytest.mark.parametrize("calls", [0, 1, 7, 30, 60])
def test_a_callback_that_raises_ends_its_request_only(calls):
    scripts, requests = tree_requests(7)
    expected = answers(toy_engine(MODEL, sampler=ScriptedSampler(scripts)).generate(requests))
    engine = toy_engine(MODEL, sampler=ScriptedSampler(scripts), max_rows=4)
    heard = []

    def listen(request_id, branch, ids):
        if request_id == 1:
            if len(heard) == calls:
                raise ConnectionError("client gone")
            heard.append(ids)

    for request in requests:
        engine.add_request(request, on_token=listen)
    results = serve(engine)
    assert results[1].finish_reason == "error"
    assert "client gone" in results[1].error
    assert len(heard) == calls
    assert parse(results[1].token_ids, VOCAB, strict=False).malformed["unclosed"] == 0
    assert [answers([results[k]])[0] for k in (0, 2)] == [expected[0], expected[2]]
    assert_drained(engine)


def test_a_callback_cannot_step_the_engine():
    engine = toy_engine(MODEL)
    engine.add_request(plain(), on_token=lambda *_: engine.step())
    result = serve(engine)[0]
    assert result.finish_reason == "error"
    assert "on_token" in result.error
    assert_drained(engine)


# -- exceptions from the model -------------------------------------------------------------------------------------


class Fails(ToyModel):
    """Raises at the chosen forward passes, after it has written keys."""

    def __init__(self, at, error=RuntimeError):
        super().__init__()
        self.at, self.error, self.calls = set(at), error, 0

    def forward(self, *args, **kwargs):
        self.calls += 1
        logits = super().forward(*args, **kwargs)
        if self.calls in self.at:
            raise self.error("out of memory")
        return logits


@pytest.mark.usefixtures("overlap")
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("page_size", [1, 16])
def test_after_a_failed_step_everything_goes_on_as_if_nothing_had_happened(page_size, error):
    scripts, requests = tree_requests(5)
    settings = {"page_size": page_size, "max_step_tokens": 20}
    expected = answers(toy_engine(ToyModel(), sampler=ScriptedSampler(scripts), **settings).generate(requests))
    engine = toy_engine(Fails({1, 2, 20, 21, 50}, error), sampler=ScriptedSampler(scripts), **settings)
    heard = []
    for request in requests:
        engine.add_request(request, on_token=lambda request_id, branch, ids: heard.extend(ids))
    results, raised = {}, 0
    while engine.has_work:
        try:
            results.update((result.request_id, result) for result in engine.step())
        except error:
            raised += 1
            engine.scheduler.places.check_integrity()
    assert raised == 5
    assert answers([results[k] for k in range(3)]) == expected
    assert len(heard) == sum(len(result.token_ids) for result in results.values())
    assert_drained(engine)


@pytest.mark.usefixtures("overlap")
@pytest.mark.parametrize("method", ["places.reset", "reset"])
def test_an_interrupt_while_a_failed_step_is_set_back_leaves_the_rest_to_the_next_step(monkeypatch, method):
    scripts, requests = tree_requests(5)
    expected = answers(toy_engine(ToyModel(), sampler=ScriptedSampler(scripts)).generate(requests))
    engine = toy_engine(Fails({20}), sampler=ScriptedSampler(scripts))
    for request in requests:
        engine.add_request(request)
    owner = engine.scheduler.places if method == "places.reset" else engine.scheduler
    real, left = owner.reset, [True]

    def reset():
        if left:
            left.pop()
            raise KeyboardInterrupt
        real()

    monkeypatch.setattr(owner, "reset", reset)
    results, raised = {}, []
    while engine.has_work:
        try:
            results.update((result.request_id, result) for result in engine.step())
        except KeyboardInterrupt as error:
            raised.append(error)
    assert len(raised) == 1
    assert answers([results[k] for k in range(3)]) == expected
    assert_drained(engine)


def test_what_was_cached_does_not_count_after_a_failed_step():
    model = Fails(set())
    engine = toy_engine(model, page_size=4)
    request = ask([TEXT + k for k in range(10)], max_tokens=20, ignore_eos=True)
    engine.generate([request])
    number = engine.add_request(request)
    engine.step()
    model.at = {model.calls + 1}
    with pytest.raises(RuntimeError):
        engine.step()
    assert serve(engine)[number].cached_tokens == 0, "its pages were given back, so it has computed all of its prompt"


def test_a_sampler_that_raises_leaves_the_engine_whole():
    class Broken(CounterSampler):
        broken = True

        def __call__(self, logits, sampling):
            if self.broken:
                raise ZeroDivisionError
            return super().__call__(logits, sampling)

    engine = toy_engine(MODEL, sampler=Broken())
    engine.add_request(plain())
    with pytest.raises(ZeroDivisionError):
        engine.step()
    engine.runner.sampler.broken = False
    assert serve(engine)[0].token_ids == toy_engine(MODEL).generate([plain()])[0].token_ids


def test_a_callback_that_fails_before_the_model_does():
    """The text stays as it was heard, and the request that heard it does not start again."""

    class BrokenSampler(ScriptedSampler):
        def __call__(self, logits, sampling):
            if failing and failing.pop():
                raise RuntimeError("out of memory")
            return super().__call__(logits, sampling)

    scripts, requests = tree_requests(7, 2)
    expected = toy_engine(MODEL, sampler=ScriptedSampler(scripts)).generate(requests)
    victim, other = sorted(range(2), key=lambda k: expected[k].decode_steps)
    engine = toy_engine(MODEL, sampler=BrokenSampler(scripts))
    heard, failing, results = [], [], {}

    def listen(request_id, branch, ids):
        if request_id == victim and heard and ids[-1] == Tag.CONCLUSION:
            failing.append(True)
            raise ConnectionError("client gone")
        heard.extend(ids if request_id == victim else ())

    for request in requests:
        engine.add_request(request, on_token=listen)
    with pytest.raises(RuntimeError):
        while engine.has_work:
            results.update((result.request_id, result) for result in engine.step())
    results |= serve(engine)
    assert results[victim].finish_reason == "error"
    assert "client gone" in results[victim].error
    assert not Counter(heard) - Counter(results[victim].token_ids)
    assert answers([results[other]]) == answers([expected[other]])
    assert_drained(engine)


def test_requests_whose_steps_keep_failing_end_with_the_error():
    engine = toy_engine(Fails(range(5, 1000)))
    for k in range(2):
        engine.add_request(plain(k))
    results = []
    for _ in range(30):
        try:
            results += engine.step()
        except RuntimeError:
            continue
    assert not engine.has_work
    for k, result in enumerate(results):
        assert result.finish_reason == "error"
        # What was written in the four good steps; the rest closes it.
        assert result.token_ids[:4] == toy_engine().generate([plain(k)])[0].token_ids[:4]
    assert all("out of memory" in r.error for r in results)
    assert engine.runner.model.calls == 4 + 3
    assert_drained(engine)


def test_a_request_that_finished_in_a_failed_step_is_not_lost():
    engine = toy_engine(Fails({1}))
    engine.add_request(plain(0))
    gone = engine.add_request(plain(1))
    engine.cancel(gone)
    with pytest.raises(RuntimeError):
        engine.step()
    results = serve(engine)
    assert results[gone].finish_reason == "abort"
    assert len(results) == 2


def test_generate_takes_its_requests_back_when_it_fails():
    engine = toy_engine(Fails({5}))
    other = engine.add_request(plain(0, tokens=12))
    with pytest.raises(RuntimeError):
        engine.generate([plain(1), plain(2)])
    results = serve(engine)
    assert list(results) == [other]
    assert len(results[other].token_ids) == 12
    assert_drained(engine)


# -- several callers -----------------------------------------------------------------------------------------------


def test_generate_keeps_the_results_of_others_for_the_next_step():
    engine = toy_engine(MODEL)
    other = engine.add_request(plain(0, tokens=5))
    own = engine.generate([plain(1, tokens=30)])
    assert len(own[0].token_ids) == 30
    assert engine.has_work
    assert [(r.request_id, len(r.token_ids)) for r in engine.step()] == [(other, 5)]
    assert_drained(engine)


def test_a_callback_may_add_requests():
    engine = toy_engine(MODEL)
    added, heard = [], set()

    def listen(index, branch, ids):
        heard.add(index)
        if not added:
            added.append(engine.add_request(plain(3, tokens=3)))

    results = engine.generate([plain(0), plain(1)], on_token=listen)
    assert [r.token_ids for r in results] == [toy_engine(MODEL).generate([plain(k)])[0].token_ids for k in range(2)]
    assert heard == {0, 1}
    assert list(serve(engine)) == added
    assert_drained(engine)


# -- cancelling ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [5, 20, 30])
def test_cancelling_a_request_that_stepped_back_returns_what_it_streamed(steps):
    scripts, requests = tree_requests(7)
    engine = toy_engine(MODEL, sampler=ScriptedSampler(scripts), page_size=16)
    heard = []
    for request in requests:
        engine.add_request(request, on_token=lambda r, b, ids: heard.extend(ids) if r == last else None)
    last = len(requests) - 1
    for _ in range(steps):
        engine.step()
    force_preemption(engine)
    assert engine.scheduler.waiting[0].request_id == last
    streamed = len(heard)
    engine.cancel(last)
    result = next(r for r in engine.step() if r.request_id == last)
    assert result.finish_reason == "abort"
    assert streamed > 0
    assert sorted(heard) == sorted(result.token_ids)
    assert result.decode_steps == steps
    assert result.position_ids == structure_positions(requests[last].prompt_ids, result)
    serve(engine)
    assert_drained(engine)


def test_cancelling_others_while_being_cancelled():
    """Cancelled from the callback that hears the closing tags of a cancelled request."""
    scripts, requests = tree_requests(7, 2)
    engine = toy_engine(MODEL, sampler=ScriptedSampler(scripts))
    closing = []
    engine.add_request(requests[0], on_token=lambda *_: closing and engine.cancel(1))
    engine.add_request(requests[1])
    for _ in range(20):
        engine.step()
    closing.append(True)
    engine.cancel(0)
    results = serve(engine)
    assert [results[k].finish_reason for k in range(2)] == ["abort", "abort"]
    assert_drained(engine)


def test_an_interrupt_in_a_callback_loses_no_result_and_no_cancellation():
    engine = toy_engine(MODEL)
    heard, interrupts = [], []

    def on_token(request_id, branch, ids):
        heard.append((request_id, ids))
        if interrupts:
            raise interrupts.pop()

    script = [int(tag) for tag in (Tag.PARALLEL, Tag.GOAL)]
    engine.runner.sampler = ScriptedSampler([{(): [*script, TEXT]}, {(): [*script, TEXT]}])
    for sample in range(2):
        engine.add_request(ask([TEXT], sample=sample, max_tokens=60), on_token=on_token)
    engine.step()
    engine.step()
    for request_id in range(2):
        engine.cancel(request_id)
    # What closes the open block is heard when the request is cancelled, and the first to hear it is interrupted.
    interrupts.append(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    results = serve(engine)
    assert {k: result.finish_reason for k, result in results.items()} == {0: "abort", 1: "abort"}
    for request_id, result in results.items():
        assert [t for k, ids in heard if k == request_id for t in ids] == result.token_ids
    assert_drained(engine)


def test_cancelling_an_id_that_is_not_given_yet_is_ignored():
    engine = toy_engine(MODEL)
    engine.cancel(0)
    engine.add_request(plain(tokens=3))
    assert serve(engine)[0].finish_reason == "length"


def test_a_step_that_fails_each_time_after_feeding_again_ends_the_request():
    class Limited(ToyModel):
        def forward(self, input_ids, position_ids, *args, **kwargs):
            if position_ids.max() >= 20:
                raise RuntimeError("too long")
            return super().forward(input_ids, position_ids, *args, **kwargs)

    engine = toy_engine(Limited(), max_step_tokens=8)
    engine.add_request(plain(tokens=40))
    results, failed = [], 0
    for _ in range(60):
        try:
            results += engine.step()
        except RuntimeError:
            failed += 1
    assert failed == 3
    assert results[0].finish_reason == "error" and "too long" in results[0].error
    assert_drained(engine)
