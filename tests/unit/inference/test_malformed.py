"""`on_malformed`: broken grammar ends the answer with an error, and changes nothing else."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from megatron_multiverse.config import SamplingParams
from megatron_multiverse.errors import GenerationError
from megatron_multiverse.inference import BY_ENGINE, Request
from megatron_multiverse.structure import Tag

from .test_engine import assert_balanced, goal
from .toy import (
    EOS,
    NEWLINE,
    TEXT,
    NullModel,
    ScriptedSampler,
    ask,
    assert_drained,
    changed,
    ids_of,
    random_prompt,
    random_script,
    toy_engine,
)

MODEL = NullModel()

pytestmark = pytest.mark.usefixtures("overlap")


def random_trees(rng: random.Random, count: int) -> tuple[list, list[Request]]:
    scripts = [random_script(rng, depth=2, blocks=2, most_paths=3, text=6) for _ in range(count)]
    return scripts, [ask(random_prompt(rng, 20), max_tokens=2000, sample=k) for k in range(count)]


def serve(rng: random.Random, scripts: list, requests: list[Request]) -> list:
    engine = toy_engine(
        MODEL,
        sampler=ScriptedSampler(scripts),
        page_size=rng.choice([1, 16]),
        max_rows=rng.choice([1, 4, 32]),
        max_step_tokens=rng.choice([7, 4096]),
    )
    results = engine.generate(requests)
    assert_drained(engine)
    return results


@pytest.mark.parametrize("seed", range(2))
def test_one_broken_branch_anywhere_ends_its_answer_with_an_error_that_names_it(seed: int) -> None:
    rng = random.Random(seed)
    scripts, requests = random_trees(rng, 3)
    serial = serve(rng, scripts, requests)
    strict = [changed(request, on_malformed="error") for request in requests]
    # What follows the grammar is answered as ever.
    assert [result.token_ids for result in serve(rng, scripts, strict)] == [result.token_ids for result in serial]

    path = rng.choice(list(scripts[1]))
    token, found = rng.choice([(int(Tag.END_OUTLINE), "</Outline>"), (EOS, "the end of the text")])
    if not path:
        token, found = int(Tag.END_OUTLINE), "</Outline>"  # outside of paths the text may end
    broken = [scripts[0], {**scripts[1], path: [token, *scripts[1][path]]}, scripts[2]]
    first, ended, last = serve(rng, broken, strict)
    assert [first.token_ids, last.token_ids] == [serial[0].token_ids, serial[2].token_ids]
    assert ended.finish_reason == "error" and ended.malformed["refused"] == 1
    name = ".".join(str(k + 1) for _, k in path)
    place = f"token {3 + len(ids_of(name + ':'))} of path {name}" if path else "token 0 of the text outside of paths"
    assert f"breaks the grammar at {place}: found {found}, expected" in ended.error
    assert_balanced(ended)

    (lenient,) = serve(rng, broken[1:2], [replace(requests[1], sample=0)])
    assert lenient.finish_reason == "stop" and lenient.malformed and not lenient.error


@pytest.mark.parametrize(
    ("root", "expected"),
    [
        ([*goal(2), NEWLINE], "at most 1 outlines"),
        ([*goal(1)[:-1], Tag.PATH], "<Outline> or </Goal>"),
        ([*goal(1)[:-2], EOS], "</Goal>"),
        ([*goal(1)[:-2], TEXT + 9], "</Goal>"),
        ([Tag.THINK, EOS], "</Think>"),
    ],
)
def test_a_header_a_limit_and_an_early_end_count(root: list[int], expected: str) -> None:
    engine = toy_engine(MODEL, sampler=ScriptedSampler([{(): [int(token) for token in root]}]), max_paths=1)
    (result,) = engine.generate([ask([TEXT], on_malformed="error", stop_token_ids=(TEXT + 9,))])
    assert result.finish_reason == "error" and result.malformed["refused"] == 1
    assert expected in result.error
    assert_drained(engine)


def test_a_spent_budget_is_no_broken_grammar() -> None:
    script = {(): [*goal(2), EOS], **{((0, k),): [TEXT] * 300 for k in range(2)}}
    engine = toy_engine(MODEL, sampler=ScriptedSampler([script]))
    (result,) = engine.generate([ask([TEXT], on_malformed="error", max_tokens=90)])
    assert result.finish_reason == "error" and "expected </Conclusion>" in result.error  # the end of its text is
    script[()] = [*goal(2), TEXT, Tag.END_CONCLUSION, NEWLINE, Tag.END_PARALLEL, EOS]
    engine = toy_engine(MODEL, sampler=ScriptedSampler([script]))
    (result,) = engine.generate([ask([TEXT], on_malformed="error", max_tokens=90)])
    assert result.finish_reason == "length" and set(result.malformed) == {"forced_close"}


def test_an_end_of_text_in_a_path_is_what_the_model_broke() -> None:
    script = {
        (): [*goal(2), TEXT, Tag.END_CONCLUSION, NEWLINE, Tag.END_PARALLEL, EOS],
        ((0, 0),): [TEXT, EOS],
        ((0, 1),): [TEXT, Tag.END_PATH],
    }
    (result,) = toy_engine(MODEL, sampler=ScriptedSampler([script])).generate([ask([TEXT])])
    assert result.finish_reason == "stop" and result.malformed == {"forced_close": 1, "unclosed": 1}
    assert result.malformed.keys() - BY_ENGINE == {"unclosed"}


def test_a_stop_token_that_ends_a_path_as_asked_is_no_broken_grammar() -> None:
    script = {
        (): [*goal(1), Tag.END_CONCLUSION, NEWLINE, Tag.END_PARALLEL, TEXT, EOS],
        ((0, 0),): [TEXT, TEXT + 9],
    }
    request = ask([TEXT], on_malformed="error", stop_token_ids=(TEXT + 9,), stop_in_branches=True)
    (result,) = toy_engine(MODEL, sampler=ScriptedSampler([script])).generate([request])
    assert result.finish_reason == "stop" and [path.finish for path in result.blocks[0].branches] == ["stop"]


@pytest.mark.parametrize("on_malformed", ["serial", "error"])
def test_an_end_of_text_among_the_stop_tokens_stays_an_end_of_text(on_malformed: str) -> None:
    """As generation_config.json of most models names it: in a path nobody asked for it."""
    script = {
        (): [*goal(1), Tag.END_CONCLUSION, NEWLINE, Tag.END_PARALLEL, TEXT, EOS],
        ((0, 0),): [TEXT, EOS],
    }
    request = ask([TEXT], on_malformed=on_malformed, stop_token_ids=(EOS,), stop_in_branches=True)
    (result,) = toy_engine(MODEL, sampler=ScriptedSampler([script])).generate([request])
    if on_malformed == "error":
        assert result.finish_reason == "error" and "of path 1: found the end of the text" in result.error
    else:
        assert result.finish_reason == "stop" and result.stop_reason is None
        assert [(path.finish, path.stop_reason) for path in result.blocks[0].branches] == [("eos", None)]


def test_what_cannot_work_is_refused() -> None:
    with pytest.raises(GenerationError, match="on_malformed must be one of serial, error, got 'stop'"):
        SamplingParams(on_malformed="stop")  # type: ignore[arg-type]
    with pytest.raises(GenerationError, match="leave out commit_after, or on_malformed"):
        SamplingParams(on_malformed="error", commit_after=1)
    with pytest.raises(GenerationError, match="branch_max_tokens must be at least 2, or unset"):
        SamplingParams(branch_max_tokens=1)
