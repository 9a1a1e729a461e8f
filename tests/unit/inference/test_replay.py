"""The next turn of a chat: earlier answers are read as text, or laid out as they were generated."""

from __future__ import annotations

import random

import pytest

from megatron_multiverse.errors import GenerationError
from megatron_multiverse.inference import Request, Result, SamplingParams
from megatron_multiverse.structure import Tag

from .test_engine import assert_balanced
from .toy import (
    TEXT,
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

MODEL = ToyModel(2)
WORDS = [TEXT, TEXT + 1, TEXT + 2]


def answer(script, request) -> Result:
    return toy_engine(MODEL, sampler=ScriptedSampler([script])).generate([request])[0]


def next_turn(*turns: Result, sample: int, replay: bool = True) -> Request:
    """A request whose prompt holds earlier turns, each followed by words of the user."""
    ids, spans = list(turns[0].prompt_ids), []
    for turn in turns:
        spans.append((len(ids), len(ids) + len(turn.token_ids)))
        ids += [*turn.token_ids, *WORDS]
    sampling = SamplingParams(max_tokens=3000)
    return Request(prompt_ids=ids, sampling=sampling, sample=sample, replay_structure=spans if replay else ())


@pytest.mark.usefixtures("overlap")
@pytest.mark.parametrize(("page_size", "max_step_tokens"), [(1, 4096), (16, 9), (16, 40)])
def test_earlier_answers_are_seen_as_they_were_written(page_size, max_step_tokens):
    for seed in range(2):
        rng = random.Random(100 * page_size + seed)
        scripts = [random_script(rng, depth=2 - seed, blocks=1, most_paths=3, text=6) for _ in range(3)]
        first = answer(scripts[0], ask(random_prompt(rng, 20), max_tokens=2000))
        second = answer(scripts[1], ask(WORDS, max_tokens=2000))
        requests = [next_turn(first, second, sample=k) for k in range(2)]
        sampler = ScriptedSampler([scripts[2], scripts[0]])
        engine = toy_engine(MODEL, sampler=sampler, page_size=page_size, max_step_tokens=max_step_tokens)
        ids = [engine.add_request(request) for request in requests]
        results, steps = {}, 0
        while engine.has_work:
            results.update((result.request_id, result) for result in engine.step())
            steps += 1
            if steps in (15, 60) and engine.scheduler.active:
                force_preemption(engine)
        served = [results[number] for number in ids]
        assert largest_difference(MODEL, sampler, requests, served) < 1e-9
        for result in served:
            assert_balanced(result)
            assert result.blocks[0].number == 1 and result.blocks[0].branches[0].path == ((0, 0),)
            assert result.critical_tokens <= len(result.token_ids)
        assert_drained(engine)


def test_without_it_they_are_text_and_both_turns_find_the_beginning():
    script = random_script(random.Random(5), depth=1, blocks=1, most_paths=3, text=6)
    first = answer(script, ask([TEXT] * 12, max_tokens=500))
    assert first.blocks
    for replay in (False, True):
        request = next_turn(first, sample=0, replay=replay)
        sampler = ScriptedSampler([script])
        engine = toy_engine(MODEL, sampler=sampler, page_size=4)
        engine.generate([ask([TEXT] * 12, max_tokens=500)])
        sampler.logits.clear()
        result = engine.generate([request])[0]
        assert largest_difference(MODEL, sampler, [request], [result]) < 1e-9
        # The root up to its first fork is causal text either way.
        assert result.cached_tokens == (12 + first.blocks[0].branches[0].start - (1 if replay else 0)) // 4 * 4
        assert_drained(engine)


def test_an_answer_that_was_cut_off_inside_a_block_is_text():
    script = random_script(random.Random(6), depth=1, blocks=1, most_paths=3, text=6)
    first = answer(script, ask([TEXT] * 5, max_tokens=500))
    cut = first.token_ids[: first.blocks[0].branches[-1].end - 3]
    assert cut.count(Tag.PARALLEL) == 1
    ids = [*first.prompt_ids, *cut, *WORDS]
    plain = ask(ids, max_tokens=8, ignore_eos=True)
    replayed = Request(prompt_ids=ids, sampling=plain.sampling, replay_structure=((5, 5 + len(cut)),))
    one, other = toy_engine(MODEL).generate([plain, replayed])
    assert (one.token_ids, one.position_ids) == (other.token_ids, other.position_ids)


@pytest.mark.parametrize("spans", [((3, 2),), ((-1, 2),), ((0, 11),), ((0, 10),), ((4, 6), (2, 3))])
def test_spans_that_cannot_be_are_refused(spans):
    with pytest.raises(GenerationError, match=r"replay_structure is .* in a prompt of 10 tokens"):
        Request(prompt_ids=[TEXT] * 10, replay_structure=spans)


def test_scores_of_a_replayed_prompt_are_refused():
    with pytest.raises(GenerationError, match="prompt_logprobs are those of a prompt read as text"):
        Request(prompt_ids=[TEXT] * 10, sampling=SamplingParams(prompt_logprobs=0), replay_structure=((0, 3),))
