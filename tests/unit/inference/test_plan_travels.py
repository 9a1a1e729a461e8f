"""A step plan is integers: written to bytes and run in another process, with its own key/value store, it gives the
same tokens. This is what another rank does."""

from __future__ import annotations

import dataclasses
import multiprocessing
import random
from multiprocessing.connection import Connection

import numpy as np
import pytest
import torch

from megatron_multiverse.inference.draft import follow_up
from megatron_multiverse.inference.step.plan import StepOutput, StepPlan
from megatron_multiverse.inference.step.runner import Runner
from megatron_multiverse.inference.step.sampler import CounterSampler

from .toy import (
    NEWLINE,
    TEXT,
    VOCAB_SIZE,
    ScriptedSampler,
    ToyModel,
    ask,
    assert_drained,
    random_prompt,
    random_script,
    toy_engine,
)

TREES = 50
ASKED = [{"top_p": 0.9}, {}, {"frequency_penalty": 0.4, "repetition_penalty": 1.2, "logprobs": 3, "min_tokens": 30}]


def make_sampler(scripts):
    """The scripts write the structure, the model the words, drawn with each branch's own noise."""

    class Sampler(ScriptedSampler):
        def __call__(self, logits, sampling):
            scripted, _ = super().__call__(logits, sampling)
            words = logits.clone()
            words[:, :TEXT] = float("-inf")
            drawn, _ = CounterSampler()(words, sampling)
            free = [
                min(self.scripts[key][index : index + 1], default=0) < 0
                for key, index in zip(sampling.keys, sampling.indices, strict=True)
            ]
            tokens = torch.where(torch.tensor(free, dtype=torch.bool), drawn, scripted)
            return tokens, logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0]

    return Sampler(scripts)


def serve_plans(connection: Connection, scripts, sizes: dict[str, int]) -> None:
    """The other process: a model and a store of its own; it sees nothing but bytes."""
    runner = Runner(ToyModel(3), sampler=make_sampler(scripts), **sizes)
    while data := connection.recv_bytes():
        connection.send(tuple(runner.run(StepPlan.from_bytes(data))))


class RemoteRunner:
    """Sends the plan away; what comes back is all that the engine learns."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection

    def launch(self, plan: StepPlan) -> RemoteRunner:
        self.connection.send_bytes(plan.to_bytes())
        return self

    def wait(self) -> StepOutput:
        return StepOutput(*self.connection.recv())


@pytest.mark.parametrize("page_size", [1, 16])
def test_another_process_gives_the_same_tokens(page_size):
    scripts, requests = [], []
    for k in range(TREES):
        rng = random.Random(500 + k)
        scripts.append(random_script(rng, depth=2, blocks=rng.choice([1, 2]), most_paths=3, text=6, free=True))
        requests.append(ask(random_prompt(rng, 20), max_tokens=1500, temperature=1.0, sample=k, **ASKED[k % 3]))
    settings = {"page_size": page_size, "num_pages": 6000 // page_size, "max_rows": 24, "debug": False}
    here = toy_engine(ToyModel(3), sampler=make_sampler(scripts), **settings)
    expected = here.generate(requests)
    assert sum(len(result.blocks) for result in expected) > TREES

    ours, theirs = multiprocessing.Pipe()
    sizes = {"num_pages": settings["num_pages"], "page_size": page_size}
    process = multiprocessing.get_context("fork").Process(target=serve_plans, args=(theirs, scripts, sizes))
    process.start()
    try:
        there = toy_engine(ToyModel(3), **settings)
        there.runner = RemoteRunner(ours)
        results = there.generate(requests)
    finally:
        ours.send_bytes(b"")
        process.join()
    assert process.exitcode == 0
    for got, want in zip(results, expected, strict=True):
        assert got.token_ids == want.token_ids
        assert got.logprobs == want.logprobs
        assert got.top_logprobs == want.top_logprobs
        assert got.position_ids == want.position_ids
    assert_drained(there)


def test_every_array_survives_the_journey():
    plans = []

    class Keeping(Runner):
        def launch(self, plan):
            plans.append(plan)
            return super().launch(plan)

    script = random_script(random.Random(1), depth=2, blocks=2, most_paths=3)
    engine = toy_engine(sampler=ScriptedSampler([script]), page_size=16)
    engine.runner.__class__ = Keeping
    engine.generate([ask([TEXT, NEWLINE], max_tokens=2000)])
    assert any(len(plan.copies) for plan in plans) and any(len(plan.write_slots) > len(plan.ids) for plan in plans)
    assert any(len(plan.freed) for plan in plans)
    for plan in plans:
        back = StepPlan.from_bytes(plan.to_bytes())
        for one, other in zip(plan._arrays(), back._arrays(), strict=True):
            assert one.dtype == other.dtype and one.shape == other.shape and np.array_equal(one, other)
    assert max(int(plan.ids.max()) for plan in plans) < VOCAB_SIZE


def test_what_a_step_was_moved_from_is_the_step_that_was_received_before():
    plans = []

    class Keeping(Runner):
        def launch(self, plan, replay=None):
            plans.append(plan)
            return super().launch(plan, replay)

    engine = toy_engine(page_size=16, overlap=True)
    engine.runner.__class__ = Keeping
    engine.generate([ask([TEXT, NEWLINE], max_tokens=40, ignore_eos=True)])
    moved = [plan.moved_from is not None for plan in plans]
    assert 30 < sum(moved) < len(plans) - 2
    before = None
    for plan, is_moved in zip(plans, moved, strict=True):
        assert StepPlan.from_bytes(plan.to_bytes()).moved_from is None
        back = StepPlan.from_bytes(plan.to_bytes(), before)
        assert back.moved_from is (before.lengths if is_moved else None)
        before = back


def test_the_order_of_writes_does_not_matter():
    class Shuffling(Runner):
        def launch(self, plan):
            order = np.random.default_rng(len(plan.ids)).permutation(len(plan.write_slots))
            return super().launch(
                dataclasses.replace(plan, write_slots=plan.write_slots[order], write_tokens=plan.write_tokens[order])
            )

    script = random_script(random.Random(2), depth=2, blocks=1, most_paths=3, free=True)
    request = ask([TEXT, NEWLINE], max_tokens=2000)
    expected = toy_engine(sampler=ScriptedSampler([script]), page_size=16).generate([request])[0]
    engine = toy_engine(sampler=ScriptedSampler([script]), page_size=16)
    engine.runner.__class__ = Shuffling
    got = engine.generate([request])[0]
    assert (got.token_ids, got.logprobs) == (expected.token_ids, expected.logprobs)


@pytest.mark.usefixtures("overlap")
@pytest.mark.parametrize("seed", range(3))
def test_follow_ups_equal_the_plans_of_drafts(seed, monkeypatch):
    """Most steps are planned from the one before; planned afresh, they are the same, byte for byte."""
    rng = random.Random(700 + seed)
    scripts = [random_script(rng, depth=2, blocks=1, most_paths=3, free=True) for _ in range(3)]
    requests = [
        ask(random_prompt(rng, 20), max_tokens=1500, temperature=1.0, sample=k, **ASKED[(seed + k) % 3])
        for k in range(3)
    ]
    max_rows = [2, 5, 24][seed]
    plans: list[bytes] = []

    class Keeping(Runner):
        def launch(self, plan):
            plans.append(dataclasses.replace(plan, moved_from=None).to_bytes())  # a draft never says that
            return super().launch(plan)

    def serve() -> list[bytes]:
        engine = toy_engine(ToyModel(3), sampler=make_sampler(scripts), page_size=4, max_rows=max_rows)
        engine.runner.__class__ = Keeping
        plans.clear()
        engine.generate(requests)
        assert_drained(engine)
        return plans.copy()

    # Only follow-ups wait for tokens that may turn what comes next, which changes what is planned.
    monkeypatch.setattr("megatron_multiverse.inference.engine.Turns.may_come", lambda *args: False)
    calls = {True: 0, False: 0}

    def counted(*args, **kwargs):
        step = follow_up(*args, **kwargs)
        calls[step is not None] += 1
        return step

    monkeypatch.setattr("megatron_multiverse.inference.scheduler.follow_up", counted)
    quick = serve()
    assert calls[True] > 10 and calls[False] > 3
    monkeypatch.setattr("megatron_multiverse.inference.scheduler.follow_up", lambda *args, **kwargs: None)
    assert quick == serve()
