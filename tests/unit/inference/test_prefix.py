"""With the prefix cache a hit changes nothing, and keys from inside a block are never found by their text."""

from __future__ import annotations

import random
from dataclasses import replace

from megatron_multiverse.inference import CounterSampler

from .toy import (
    TEXT,
    VOCAB_SIZE,
    ScriptedSampler,
    ToyModel,
    ask,
    assert_drained,
    largest_difference,
    random_script,
    toy_engine,
)

MODEL = ToyModel()


def prompt(seed: int, length: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(TEXT, VOCAB_SIZE) for _ in range(length)]


def test_a_hit_and_a_miss_give_the_same_logits():
    scripts = [random_script(random.Random(k), depth=2, blocks=1, text=6) for k in range(4)]
    requests = [ask([*prompt(0, 40), *prompt(k, 7)], max_tokens=2000, sample=k) for k in range(4)]
    sampler = ScriptedSampler(scripts)
    engine = toy_engine(MODEL, sampler=sampler, page_size=16)
    results = [engine.generate([request])[0] for request in requests]
    assert [r.cached_tokens for r in results] == [0, 32, 32, 32]
    assert largest_difference(MODEL, sampler, requests, results) < 1e-9
    cold_engine = toy_engine(MODEL, sampler=ScriptedSampler(scripts), page_size=16, prefix_cache=False)
    cold = cold_engine.generate(requests)
    assert [r.cached_tokens for r in cold] == [0] * 4
    assert [r.token_ids for r in results] == [r.token_ids for r in cold]
    assert_drained(engine)


def test_text_of_a_branch_never_finds_the_keys_of_the_branch():
    script = random_script(random.Random(3), depth=1, blocks=2, text=30)
    first = ask(prompt(1, 32), max_tokens=2000)
    engine = toy_engine(MODEL, sampler=ScriptedSampler([script]), page_size=1)
    answer = engine.generate([first])[0]
    assert answer.blocks
    engine.runner.sampler = CounterSampler()
    for end in (len(answer.token_ids) // 2, len(answer.token_ids)):
        request = ask([*first.prompt_ids, *answer.token_ids[:end]], max_tokens=5, ignore_eos=True)
        got = engine.generate([request])[0]
        # The first answer is found up to its first path, the second time the sequential prompt of the first time is.
        known = answer.blocks[0].branches[0].start if end < len(answer.token_ids) else len(answer.token_ids) // 2
        known += 32
        assert got.cached_tokens == known
        assert got.token_ids == toy_engine(MODEL, page_size=1).generate([request])[0].token_ids
    assert_drained(engine)


def test_a_prompt_that_is_known_whole_still_computes_its_last_token():
    engine = toy_engine(MODEL, page_size=4)
    request = ask(prompt(2, 16), max_tokens=6, ignore_eos=True)
    first, second = engine.generate([request])[0], engine.generate([request])[0]
    assert first.token_ids == second.token_ids
    assert (first.cached_tokens, second.cached_tokens) == (0, 12)
    assert_drained(engine)


def test_requests_that_come_at_once_compute_their_common_beginning_once():
    """Pages are shared in the very step that computes them, and when a long prompt takes several steps."""
    scripts = [random_script(random.Random(k), depth=1, blocks=1, text=6) for k in range(4)]
    requests = [ask([*prompt(0, 70), *prompt(k % 2, 9)], max_tokens=2000, sample=k) for k in range(4)]
    for max_step_tokens in (4096, 24):
        sampler = ScriptedSampler(scripts)
        engine = toy_engine(MODEL, sampler=sampler, page_size=8, max_step_tokens=max_step_tokens)
        computed, launch = [], engine.runner.launch
        engine.runner.launch = lambda plan: computed.append(len(plan.ids)) or launch(plan)  # noqa: B023
        results = engine.generate(requests)
        assert [r.cached_tokens for r in results] == [0, 64, 72, 72]
        assert largest_difference(MODEL, sampler, requests, results) < 1e-9
        own = sum(len(r.token_ids) for r in results)
        assert sum(computed) <= 79 + 15 + 7 + 7 + own
        assert_drained(engine)


def test_a_chat_goes_on_from_what_the_answer_before_computed():
    engine = toy_engine(MODEL, page_size=4)
    first = engine.generate([ask(prompt(1, 10), max_tokens=30, ignore_eos=True)])[0]
    turn = ask([*first.prompt_ids, *first.token_ids, *prompt(2, 6)], max_tokens=8, ignore_eos=True)
    second = engine.generate([turn])[0]
    assert second.cached_tokens == 36  # 10 + 30 tokens, of which the last one was never fed
    assert second.token_ids == toy_engine(MODEL, prefix_cache=False).generate([turn])[0].token_ids
    assert_drained(engine)


def test_salts_keep_tenants_apart():
    engine = toy_engine(MODEL, page_size=4)
    requests = [replace(ask(prompt(1, 20), max_tokens=4), cache_salt=salt) for salt in ("a", "b", "a")]
    results = [engine.generate([request])[0] for request in requests]
    assert [r.cached_tokens for r in results] == [0, 0, 16]
    assert len({tuple(r.token_ids) for r in results}) == 1


def test_what_is_kept_gives_way_to_what_runs_and_goes_from_its_end():
    """A page is found only after those before it: what is left of a prompt must begin at its beginning."""
    engine = toy_engine(MODEL, page_size=4, num_pages=16)

    def answer(seed, length=17, tokens=4):
        result = engine.generate([ask(prompt(seed, length), max_tokens=tokens, ignore_eos=True)])[0]
        assert (len(result.token_ids), result.error) == (tokens, "")
        return result.cached_tokens

    assert [answer(1), answer(2), answer(1)] == [0, 0, 16]
    assert len(engine.scheduler.places.prefixes) == 10  # 17 + 3 tokens fed of each
    # Ten pages: six are free; the last page of the first answer and three of the second were used longest ago.
    answer(3, 4, 36)
    assert [answer(1), answer(2)] == [16, 8]
    answer(4, 4, 60)  # all 16 pages
    assert [answer(1), answer(2), answer(3)] == [0, 0, 0]
    assert_drained(engine)


def test_keys_that_are_not_finite_are_found_by_nobody():
    class Breaks(ToyModel):
        broken = True

        def forward(self, *args, **kwargs):
            logits = super().forward(*args, **kwargs)
            return logits * float("nan") if self.broken else logits

    model = Breaks()
    engine = toy_engine(model, page_size=4)
    request = ask(prompt(1, 20), max_tokens=4, ignore_eos=True)
    assert engine.generate([request])[0].finish_reason == "error"
    model.broken = False
    result = engine.generate([request])[0]
    assert (result.finish_reason, result.cached_tokens) == ("length", 0)
    assert_drained(engine)
