"""`commit_text`, which takes most tokens, beside `commit_token`, which takes any."""

from __future__ import annotations

import dataclasses
import random

import pytest

from megatron_multiverse.inference import engine as engine_module
from tests.unit.inference import toy

ASKS: list[dict[str, object]] = [
    {},
    {"stop": ("ab",), "stop_in_branches": True},
    {"logprobs": 2},
    {"repetition_penalty": 1.3},
    {"commit_after": 1},
    {"branch_max_tokens": 5},
    {"stop_token_ids": (toy.TEXT + 3,)},
]


@pytest.mark.usefixtures("overlap")
@pytest.mark.parametrize("seed", range(6))
def test_text_taken_the_quick_way_leaves_the_same(seed, monkeypatch):
    """Random trees and random limits, all asked for in the same batch; what is heard and all results are equal."""
    rng = random.Random(4000 + seed)
    scripts = [toy.random_script(rng, depth=2, blocks=2, most_paths=3, text=8, free=True) for _ in ASKS]
    requests = [
        toy.ask(toy.random_prompt(rng), max_tokens=rng.choice([30, 200, 1500]), temperature=1.0, sample=k, **ask)
        for k, ask in enumerate(ASKS)
    ]
    quick = engine_module.commit_text
    taken = {True: 0, False: 0}

    def counted(*args: object) -> bool:
        done = quick(*args)
        taken[done] += 1
        return done

    def serve() -> tuple[list[dict[str, object]], list[tuple[object, ...]]]:
        heard: list[tuple[object, ...]] = []
        engine = toy.toy_engine(toy.ToyModel(seed), sampler=toy.ScriptedSampler(scripts), page_size=4)
        results = engine.generate(
            requests, on_token=lambda index, name, ids: heard.append((index, name, list(ids), ids.logprob))
        )
        toy.assert_drained(engine)
        return [dataclasses.asdict(result) for result in results], heard

    monkeypatch.setattr(engine_module, "commit_text", counted)
    got = serve()
    assert taken[True] > 20 and taken[False] > 20
    monkeypatch.setattr(engine_module, "commit_text", lambda *args: False)
    assert serve() == got
