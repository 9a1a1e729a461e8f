"""`answer_start`: an answer that begins with given text is the one that would have drawn it."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from megatron_multiverse.errors import GenerationError
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
    structure_positions,
    toy_engine,
)

MODEL = ToyModel()

pytestmark = pytest.mark.usefixtures("overlap")


@pytest.mark.parametrize("seed", range(2))
def test_it_is_the_answer_that_would_have_drawn_it(seed: int) -> None:
    rng = random.Random(seed)
    scripts = [random_script(rng, depth=2, blocks=2, most_paths=3, text=6) for _ in range(3)]
    requests = [ask(random_prompt(rng, 25), max_tokens=2000, sample=k, logprobs=k) for k in range(3)]
    drawn = toy_engine(MODEL, sampler=ScriptedSampler(scripts)).generate(requests)
    begun, shorter = [], []
    for request, script in zip(requests, scripts, strict=True):
        cut = script[()].index(Tag.END_GOAL) + 1 if rng.random() < 0.7 else rng.randint(0, script[()].index(Tag.GOAL))
        begun.append(replace(request, answer_start=script[()][:cut]))
        shorter.append({**script, (): script[()][cut:]})
    sampler = ScriptedSampler(shorter)
    engine = toy_engine(
        MODEL,
        sampler=sampler,
        page_size=rng.choice([1, 16]),
        max_rows=rng.choice([1, 3, 32]),
        max_step_tokens=rng.choice([1, 7, 4096]),
    )
    heard: dict[tuple[int, str], list[int]] = {}
    for request in begun:
        engine.add_request(request, on_token=lambda r, b, ids: heard.setdefault((r, b), []).extend(ids))
    results = {}
    for step in range(10_000):
        if not engine.has_work:
            break
        if engine.scheduler.active and step in (2, 30):
            force_preemption(engine)
        results.update((result.request_id, result) for result in engine.step())
    assert_drained(engine)
    answers = [results[k] for k in range(3)]
    assert largest_difference(MODEL, sampler, begun, answers) < 1e-9
    for request, result, whole in zip(begun, answers, drawn, strict=True):
        assert result.token_ids == whole.token_ids and result.finish_reason == "stop"
        assert (result.labels, result.parents) == (whole.labels, whole.parents)
        assert result.position_ids == whole.position_ids == structure_positions(request.prompt_ids, result)
        assert not any(result.sampled[: len(request.answer_start)])
        assert result.critical_tokens == whole.critical_tokens and len(result.weight_versions) == len(whole.token_ids)
        assert sum(len(ids) for (r, _), ids in heard.items() if r == result.request_id) == len(result.token_ids)


def test_budgets_count_it_and_paths_have_their_own_limit() -> None:
    script = {(): [TEXT] * 300, **{((0, k),): [TEXT] * 300 for k in range(3)}}
    request = ask([TEXT], max_tokens=200, branch_max_tokens=20, ignore_eos=True)
    request = replace(request, answer_start=goal(3))
    (result,) = toy_engine(MODEL, sampler=ScriptedSampler([script])).generate([request])
    (block,) = result.blocks
    assert [path.end - path.start for path in block.branches] == [25, 25, 25]
    assert len(result.token_ids) == 200 and result.finish_reason == "length"
    assert result.token_ids[-3:] == [Tag.END_CONCLUSION, NEWLINE, Tag.END_PARALLEL]


@pytest.mark.parametrize(("at_once", "late"), [(None, 0), (2, 1), (1, 2)])
def test_paths_of_later_waves_are_counted(at_once: int | None, late: int) -> None:
    script = {(): [TEXT] * 300, **{((0, k),): [TEXT] * 300 for k in range(3)}}
    request = ask([TEXT], max_tokens=200, branch_max_tokens=20, ignore_eos=True, max_concurrent_branches=at_once)
    engine = toy_engine(MODEL, sampler=ScriptedSampler([script]))
    (result,) = engine.generate([replace(request, answer_start=goal(3))])
    assert result.late_paths == late


def test_one_that_does_not_leave_room_for_its_paths_is_closed() -> None:
    request = replace(ask([TEXT], max_tokens=len(goal(2)) + 7), answer_start=goal(2))
    engine = toy_engine(MODEL)
    (result,) = engine.generate([request])
    assert result.finish_reason == "length" and result.malformed["fork_refused"] == 1 and not result.blocks
    assert_drained(engine)


@pytest.mark.parametrize(
    ("start", "message"),
    [
        ([*goal(2), NEWLINE], "goes on after the </Goal> at token"),
        ([Tag.END_GOAL], "breaks the grammar at token 0: found </Goal>, expected"),
        ([VOCAB_SIZE], "token 0 of answer_start is 48"),
        (goal(9), "expected at most 8 outlines"),
        ([TEXT] * 60, "take 60 tokens; .* leave 50"),
        (goal(1)[:3], "take 7 tokens"),
    ],
)
def test_one_that_cannot_begin_an_answer_is_refused(start: list[int], message: str) -> None:
    most = {"take 7 tokens": 6, "expected at most 8 outlines": 500}.get(message, 50)
    request = replace(ask([TEXT], max_tokens=most), answer_start=start)
    engine = toy_engine(MODEL, max_paths=8)
    with pytest.raises(GenerationError, match=message):
        engine.add_request(request)
    assert not engine.has_work


def test_a_stop_text_in_it_ends_the_answer() -> None:
    engine = toy_engine(MODEL)
    (result,) = engine.generate([replace(ask([TEXT], stop=("ab",)), answer_start=[TEXT, TEXT + 1])])
    assert result.finish_reason == "stop" and result.token_ids == [TEXT, TEXT + 1]
    assert result.stop_reason == "ab" and EOS not in result.token_ids
    assert_drained(engine)
