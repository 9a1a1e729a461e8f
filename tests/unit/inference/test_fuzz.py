"""Everything that can be asked, at random and together: whatever is switched on, a request ends, in budget, exact,
without a leak, and does not change its neighbours.

A portion is three seeds of trees and eight of tag soup, and `make test` runs the first one. MULTIVERSE_FUZZ=100 runs
the first hundred portions, MULTIVERSE_FUZZ=40:60 those from 40 up to 59; `tools/dev/fuzz.py` spreads them over
processes.
"""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Iterator
from dataclasses import replace

import pytest

from megatron_multiverse.inference import Engine, Request, Result
from megatron_multiverse.structure import lay_out, parse

from .test_engine import assert_balanced, goal
from .test_shaping import random_params
from .test_soup import check_paths
from .test_trial import by_length
from .toy import (
    TEXT,
    VOCAB,
    VOCAB_SIZE,
    NullModel,
    ScriptedSampler,
    SoupSampler,
    ToyModel,
    assert_drained,
    changed,
    force_preemption,
    largest_difference,
    random_prompt,
    random_script,
    structure_positions,
    toy_engine,
    toy_text,
)

NULL = NullModel()


def seeds(per_portion: int) -> range:
    """Those of the portions that MULTIVERSE_FUZZ names."""
    first, _, end = os.environ.get("MULTIVERSE_FUZZ", "1").rpartition(":")
    return range(per_portion * int(first or 0), per_portion * int(end))


UNEDITED: dict[str, object] = {
    "logit_bias": {}, "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0, "min_tokens": 0,
    "max_critical_tokens": None,
}  # fmt: skip
"""What leaves the sampler the logits of the model, and a script its whole length."""

MOST_CPU_SECONDS = 300

pytestmark = [pytest.mark.usefixtures("overlap", "cpu_limit"), pytest.mark.timeout(0)]


@pytest.fixture
def cpu_limit() -> Iterator[None]:
    """A case that hangs fails; one whose process was paused, or starved by others, does not."""

    def give_up(*_: object) -> None:
        raise TimeoutError(f"no end after {MOST_CPU_SECONDS} s of CPU time")

    before = signal.signal(signal.SIGPROF, give_up)
    signal.setitimer(signal.ITIMER_PROF, MOST_CPU_SECONDS)
    yield
    signal.setitimer(signal.ITIMER_PROF, 0)
    signal.signal(signal.SIGPROF, before)


def random_request(rng: random.Random, sample: int, *, max_tokens: int, seed: int = 0) -> Request:
    """A request that asks for anything."""
    extra: dict[str, object] = {
        "max_tokens": max_tokens,
        "min_tokens": rng.choice([0, 0, min(9, max_tokens)]),
        "seed": seed,
        "commit_after": rng.choice([0, 0, 1, 2]),
        "max_critical_tokens": rng.choice([None, None, rng.randint(1, max_tokens)]),
        "max_concurrent_branches": rng.choice([None, None, 1, 2]),
        "prompt_logprobs": rng.choice([None, None, 0, 3]),
        "stop": rng.choice([(), (), ("ab", "\n2:c", "d")]),
        "stop_token_ids": rng.choice([(), (), (TEXT + 7,)]),
        "stop_in_branches": rng.random() < 0.5,
        "ignore_eos": rng.random() < 0.1,
    }
    extra["branch_max_tokens"] = rng.choice([None, None, rng.randint(2, 30)])
    extra["on_malformed"] = "error" if rng.random() < 0.3 and not extra["commit_after"] else "serial"
    params = random_params(rng, **extra)
    accept = by_length(rng.randrange(3)) if params.commit_after and rng.random() < 0.7 else None
    begins = max_tokens > 80 and params.max_critical_tokens is None and rng.random() < 0.3
    start = goal(rng.randint(1, 3)) if begins else ()
    prompt = random_prompt(rng, 25)
    priority = rng.choice([0, 0, 0, -1, 1])
    return Request(
        prompt_ids=prompt, sampling=params, sample=sample, accept=accept, answer_start=start, priority=priority
    )


def random_engine(rng: random.Random, **settings: object) -> Engine:
    page_size = rng.choice([1, 16, 64])
    return toy_engine(
        page_size=page_size,
        max_rows=rng.choice([1, 3, 16]),
        max_step_tokens=rng.choice([1, 7, 64, 4096]),
        prefix_cache=rng.random() < 0.7,
        **{"num_pages": 20_000 // page_size, **settings},
    )


def serve(engine: Engine, requests: list[Request], rng: random.Random, cancelled: set[int]) -> dict[int, Result]:
    """Serve them, with steps back and cancellations on the way; by request id."""
    first = [engine.add_request(request) for request in requests]
    results: dict[int, Result] = {}
    # A few times only: a request that steps back again and again before it is fed again never goes on.
    preempt_at = set(rng.sample(range(120), 3))
    limit = 200 + 20 * sum(request.sampling.max_tokens + len(request.prompt_ids) for request in requests)
    for step in range(limit):
        results.update((result.request_id, result) for result in engine.step())
        if not engine.has_work:
            break
        if engine.scheduler.active and step in preempt_at:
            force_preemption(engine)
        if step == 20:
            for k in cancelled:
                engine.cancel(first[k])
    assert sorted(results) == first, "hangs"
    return results


def check(request: Request, result: Result) -> None:
    sampling, prompt = request.sampling, len(request.prompt_ids)
    assert len(result.token_ids) + result.dropped_tokens <= sampling.max_tokens
    assert result.critical_tokens <= (sampling.max_critical_tokens or sampling.max_tokens)
    assert result.position_ids == structure_positions(request.prompt_ids, result)
    document = parse([*result.prompt_ids, *result.token_ids], VOCAB, prompt_length=prompt, strict=False)
    assert result.labels == lay_out(document).r[prompt:].tolist()
    assert_balanced(result)
    check_paths(request, result)
    for match in result.stops:
        assert toy_text(result.token_ids[match.start : match.end]).startswith(match.kept + match.text)
    if result.finish_reason in ("stop", "length") and sampling.prompt_logprobs is not None:
        assert result.prompt_logprobs is not None and len(result.prompt_logprobs) == prompt


@pytest.mark.parametrize("seed", seeds(3))
def test_random_trees_equal_one_forward(seed: int) -> None:
    """Scripted trees in float64 on a model that attends: logits, log-probabilities, labels and positions."""
    rng = random.Random(1_000_000 + seed)
    model = ToyModel(seed % 7)
    scripts, requests = [], []
    for k in range(2):
        scripts.append(random_script(rng, depth=rng.choice([1, 2, 2, 3]), blocks=2, most_paths=3, text=6))
        request = random_request(rng, k, max_tokens=2000)
        requests.append(replace(changed(request, ignore_eos=False, **UNEDITED), answer_start=()))
    sampler = ScriptedSampler(scripts)
    results = serve(engine := random_engine(rng, model=model, sampler=sampler), requests, rng, set())
    assert_drained(engine)
    answers = [results[k] for k in range(2)]
    assert largest_difference(model, sampler, requests, answers, tokens_only=True) < 1e-9
    for request, result in zip(requests, answers, strict=True):
        check(request, result)
    waves = [changed(request, max_concurrent_branches=1) for request in requests]
    again = serve(random_engine(rng, model=model, sampler=ScriptedSampler(scripts)), waves, rng, set())
    for k in range(2):
        assert again[k].token_ids == results[k].token_ids
        assert again[k].dropped_tokens == results[k].dropped_tokens
        assert (again[k].stops, again[k].stop_reason) == (results[k].stops, results[k].stop_reason)


@pytest.mark.parametrize("seed", seeds(8))
def test_whatever_is_written_ends_and_changes_no_neighbour(seed: int) -> None:
    """Tag soup under every setting, with requests cancelled beside it."""
    rng = random.Random(2_000_000 + seed)
    requests = [random_request(rng, k, max_tokens=rng.randint(1, 250)) for k in range(3)]
    cancelled = {k for k in range(3) if rng.random() < 0.3}
    settings = {"model": NULL, "sampler": SoupSampler(seed), "vocab_size": VOCAB_SIZE}
    results = serve(engine := random_engine(rng, **settings), requests, rng, cancelled)
    assert_drained(engine)
    for k, request in enumerate(requests):
        check(request, results[k])
    kept = [k for k in range(3) if k not in cancelled]
    alone = serve(engine := random_engine(rng, **settings), [requests[k] for k in kept], rng, set())
    assert_drained(engine)
    for number, k in enumerate(kept):
        assert alone[number].finish_reason == results[k].finish_reason
        if results[k].finish_reason == "error":
            continue  # how far the other paths are by then depends on what runs beside them
        assert alone[number].token_ids == results[k].token_ids
        assert alone[number].dropped_tokens == results[k].dropped_tokens


def test_the_cases_cover_what_they_are_for() -> None:
    """Answers with tries that were dropped, stop texts that were found, and answers that ended early all occur."""
    seen: dict[str, int] = {"dropped": 0, "stops": 0, "length": 0, "blocks": 0, "error": 0, "full paths": 0}
    for seed in range(40):
        if all(seen.values()):
            break
        rng = random.Random(2_000_000 + seed)
        requests = [random_request(rng, k, max_tokens=rng.randint(1, 250)) for k in range(3)]
        for result in random_engine(rng, model=NULL, sampler=SoupSampler(seed)).generate(requests):
            seen["dropped"] += result.dropped_tokens > 0
            seen["stops"] += bool(result.stops)
            seen["length"] += result.finish_reason == "length"
            seen["blocks"] += bool(result.blocks)
            seen["error"] += result.malformed["refused"] > 0
            limited = requests[result.request_id].sampling.branch_max_tokens is not None
            ends = [branch.finish for block in result.blocks for branch in block.branches]
            seen["full paths"] += limited and "length" in ends
    assert all(seen.values()), seen
