"""Log-probabilities of the prompt are those of one forward over it, in chunks, beside others, after stepping back."""

from __future__ import annotations

import dataclasses
import random

import pytest

from megatron_multiverse.inference import Result, scheduler

from .toy import (
    TEXT,
    VOCAB_SIZE,
    ToyModel,
    ask,
    assert_drained,
    force_preemption,
    forward_logits,
    random_prompt,
    toy_engine,
)

MODEL = ToyModel(4)


@pytest.mark.usefixtures("overlap")
@pytest.mark.parametrize("seed", range(4))
def test_they_equal_one_forward(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(seed)
    monkeypatch.setattr(scheduler, "MOST_SCORED", rng.choice([2, 5, 256]))
    common = random_prompt(rng, 30)
    prompts = [[*common, *random_prompt(rng, 10)] for _ in range(5)] + [[3]]
    requests = [
        ask(prompt, max_tokens=12, prompt_logprobs=rng.choice([None, 0, 1, 5]), ignore_eos=True) for prompt in prompts
    ]
    engine = toy_engine(MODEL, page_size=rng.choice([1, 16]), max_step_tokens=rng.choice([3, 11, 4096]))
    for request in requests:
        engine.add_request(request)
    results, steps = {}, 0
    while engine.has_work:
        results.update((result.request_id, result) for result in engine.step())
        steps += 1
        if steps in (2, 5) and engine.scheduler.active:
            force_preemption(engine)
    for k, request in enumerate(requests):
        result, count = results[k], request.sampling.prompt_logprobs
        if count is None:
            assert result.prompt_logprobs is None and result.prompt_top_logprobs is None
            continue
        own = forward_logits(MODEL, request.prompt_ids, result).log_softmax(-1)
        assert result.prompt_logprobs is not None and len(result.prompt_logprobs) == len(request.prompt_ids)
        assert result.prompt_logprobs[0] is None
        for index, logprob in enumerate(result.prompt_logprobs[1:]):
            assert logprob is not None
            assert abs(logprob - own[index, request.prompt_ids[index + 1]].item()) < 1e-9
        if count == 0:
            assert result.prompt_top_logprobs is None
            continue
        assert result.prompt_top_logprobs is not None and result.prompt_top_logprobs[0] is None
        for index, top in enumerate(result.prompt_top_logprobs[1:]):
            assert top is not None
            values, ids = own[index].topk(count)
            assert [token for token, _ in top] == ids.tolist()
            assert max(abs(a - b) for (_, a), b in zip(top, values.tolist(), strict=True)) < 1e-9
    engine.scheduler.places.prefixes.clear()
    assert_drained(engine)


@pytest.mark.usefixtures("overlap")
@pytest.mark.parametrize("cancelled", [(), (0,), (0, 1)])
def test_every_answer_to_a_prompt_has_all_of_them(cancelled: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """The answers share one pass over the prompt. None ends before it has; if the answer that makes it is cancelled,
    another one makes it."""
    monkeypatch.setattr(scheduler, "MOST_SCORED", 5)
    prompt = random.Random(1).choices(range(TEXT, VOCAB_SIZE), k=40)
    request = ask(prompt, max_tokens=1, n=3, temperature=1.0, prompt_logprobs=2)
    engine = toy_engine(MODEL, page_size=4)
    first = engine.add_request(request)
    engine.step()
    for k in cancelled:
        engine.cancel(first + k)
    results: dict[int, Result] = {}
    while engine.has_work:
        results |= {result.request_id: result for result in engine.step()}
    own = forward_logits(MODEL, request.prompt_ids, results[first + 2]).log_softmax(-1)
    for k in range(3):
        result = results[first + k]
        if k in cancelled:
            assert result.finish_reason == "abort"
            continue
        assert result.prompt_logprobs is not None and len(result.prompt_logprobs) == 40
        assert result.prompt_top_logprobs is not None and len(result.prompt_top_logprobs) == 40
        for index, logprob in enumerate(result.prompt_logprobs[1:]):
            assert logprob is not None
            assert abs(logprob - own[index, request.prompt_ids[index + 1]].item()) < 1e-9
    engine.scheduler.places.prefixes.clear()
    assert_drained(engine)


@pytest.mark.usefixtures("overlap")
@pytest.mark.parametrize("n", [1, 3])
def test_an_answer_that_is_complete_before_its_prompt_is_read_has_all_of_them(
    n: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`answer_start` takes all of max_tokens, so nothing is drawn; the prompt takes eight steps all the same."""
    monkeypatch.setattr(scheduler, "MOST_SCORED", 5)
    prompt = random.Random(2).choices(range(TEXT, VOCAB_SIZE), k=40)
    request = ask(prompt, max_tokens=2, n=n, temperature=1.0, prompt_logprobs=1)
    request = dataclasses.replace(request, answer_start=(TEXT, TEXT + 1))
    engine = toy_engine(MODEL, page_size=4)
    results = engine.generate([request])
    own = forward_logits(MODEL, prompt, results[0]).log_softmax(-1)
    for result in results:
        assert result.token_ids == [TEXT, TEXT + 1] and result.finish_reason == "length"
        assert result.prompt_logprobs is not None and len(result.prompt_logprobs) == 40
        for index, logprob in enumerate(result.prompt_logprobs[1:]):
            assert logprob is not None
            assert abs(logprob - own[index, prompt[index + 1]].item()) < 1e-9
    engine.scheduler.places.prefixes.clear()
    assert_drained(engine)
