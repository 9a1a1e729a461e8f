"""With the prefix cache a hit changes nothing, and keys from inside a block are never found by their text."""

from __future__ import annotations

import random

from megatron_multiverse.inference import CounterSampler

from .toy import (
    TEXT,
    VOCAB_SIZE,
    ScriptedSampler,
    ToyModel,
    ask,
    largest_difference,
    random_script,
    toy_engine,
)

MODEL = ToyModel()


def prompt(seed: int, length: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(TEXT, VOCAB_SIZE) for _ in range(length)]


def assert_only_the_cache_owns(engine):
    engine.book.check_integrity([engine.scheduler.prefixes.pages])
    assert not engine.has_work
    engine.scheduler.prefixes.clear()
    assert len(engine.book.free) == engine.book.num_pages


def test_a_hit_and_a_miss_give_the_same_logits():
    scripts = [random_script(random.Random(k), depth=2, blocks=1, text=6) for k in range(4)]
    requests = [ask([*prompt(0, 40), *prompt(k, 7)], max_tokens=2000, sample=k) for k in range(4)]
    sampler = ScriptedSampler(scripts)
    engine = toy_engine(MODEL, sampler=sampler, page_size=16, prefix_pages=50)
    results = [engine.generate([request])[0] for request in requests]
    assert [r.cached_tokens for r in results] == [0, 32, 32, 32]
    assert largest_difference(MODEL, sampler, requests, results) < 1e-9
    cold = toy_engine(MODEL, sampler=ScriptedSampler(scripts), page_size=16).generate(requests)
    assert [r.token_ids for r in results] == [r.token_ids for r in cold]
    assert_only_the_cache_owns(engine)


def test_text_of_a_branch_never_finds_the_keys_of_the_branch():
    script = random_script(random.Random(3), depth=1, blocks=2, text=30)
    first = ask(prompt(1, 32), max_tokens=2000)
    engine = toy_engine(MODEL, sampler=ScriptedSampler([script]), page_size=1, prefix_pages=2000)
    answer = engine.generate([first])[0]
    assert answer.blocks
    engine.runner.sampler = CounterSampler()
    for end in (len(answer.token_ids) // 2, len(answer.token_ids)):
        request = ask([*first.prompt_ids, *answer.token_ids[:end]], max_tokens=5, ignore_eos=True)
        got = engine.generate([request])[0]
        # The first prompt is found (and, the second time, the sequential prompt of the first time), no branch is.
        known = 32 if end < len(answer.token_ids) else 32 + len(answer.token_ids) // 2
        assert got.cached_tokens == known
        assert got.token_ids == toy_engine(MODEL, page_size=1).generate([request])[0].token_ids
    assert_only_the_cache_owns(engine)


def test_a_prompt_that_is_known_whole_still_computes_its_last_token():
    engine = toy_engine(MODEL, page_size=4, prefix_pages=50)
    request = ask(prompt(2, 16), max_tokens=6, ignore_eos=True)
    first, second = engine.generate([request])[0], engine.generate([request])[0]
    assert first.token_ids == second.token_ids
    assert (first.cached_tokens, second.cached_tokens) == (0, 12)
    assert_only_the_cache_owns(engine)


def test_the_cache_keeps_what_was_used_last_and_gives_way_to_what_runs():
    engine = toy_engine(MODEL, page_size=4, num_pages=16, prefix_pages=6)

    def answer(seed):
        return engine.generate([ask(prompt(seed, 17), max_tokens=4, ignore_eos=True)])[0]

    answer(1)
    answer(2)
    assert len(engine.scheduler.prefixes.pages) == 6
    assert answer(2).cached_tokens == 16
    # 60 of 64 tokens: what is kept must go, or the request could not finish.
    long = ask(prompt(3, 4), max_tokens=60, ignore_eos=True)
    result = engine.generate([long])[0]
    assert len(result.token_ids) == 60
    assert result.error == ""
    assert_only_the_cache_owns(engine)


def test_the_end_of_a_prompt_goes_before_its_beginning():
    """A page is found only after those before it: what is left of a prompt must begin at its beginning."""
    engine = toy_engine(MODEL, page_size=4, num_pages=100, prefix_pages=6)

    def answer(seed, length):
        return engine.generate([ask(prompt(seed, length), max_tokens=4, ignore_eos=True)])[0].cached_tokens

    answer(1, 17)  # keeps four pages
    answer(2, 17)  # four more, so two of the first prompt go
    assert answer(1, 17) == 8
    answer(3, 60)  # longer than all that is kept
    assert answer(3, 60) == 24
    assert_only_the_cache_owns(engine)
