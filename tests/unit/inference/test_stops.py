"""Stop texts end an answer or a path wherever they fall on tokens, and no budget, wave or neighbour changes where."""

from __future__ import annotations

import random

import pytest

from megatron_multiverse.config import SamplingParams
from megatron_multiverse.errors import GenerationError
from megatron_multiverse.inference import Engine, EngineConfig, IncrementalDetokenizer, Request, Result, answer_text
from megatron_multiverse.inference.text.result import StopMatch
from megatron_multiverse.inference.text.scanner import StopScanner
from megatron_multiverse.structure import Tag

from .test_engine import assert_balanced, goal
from .toy import (
    EOS,
    NEWLINE,
    TEXT,
    VOCAB,
    NullModel,
    ScriptedSampler,
    SoupSampler,
    ToyModel,
    ask,
    assert_drained,
    changed,
    ids_of,
    random_prompt,
    toy_engine,
    toy_text,
)

MODEL = NullModel()

pytestmark = pytest.mark.usefixtures("overlap")


def serve(script: dict[tuple[tuple[int, int], ...], list[int]], request: Request, **settings: object) -> Result:
    engine = toy_engine(MODEL, sampler=ScriptedSampler([script]), **settings)
    (result,) = engine.generate([request])
    assert_balanced(result)
    assert_drained(engine)
    return result


END = [int(Tag.END_CONCLUSION), NEWLINE, int(Tag.END_PARALLEL)]
END_PATH = int(Tag.END_PATH)
SCRIPT = {
    (): [*ids_of("abc"), *goal(2), *ids_of("defg"), *END, *ids_of("hij"), EOS],
    ((0, 0),): [*ids_of("klmn"), END_PATH],
    ((0, 1),): [*ids_of("klop"), END_PATH],
}


@pytest.mark.parametrize(
    ("stop", "text"),
    [
        (("bc",), "a"),
        (("ef", "fg"), "...\n<Conclusion>d\n</Conclusion>\n</Parallel>"),
        # It begins in what the engine forced, and ends in what the model drew.
        (("<Conclusion>de",), "...\n\n</Conclusion>\n</Parallel>"),
        (("<Conclusion>",), "...\n\n</Conclusion>\n</Parallel>"),
        (("lm", "zz"), None),
        # The text before the paths does not go on in the conclusion.
        (("</Goal>\n<Conclusion>",), None),
    ],
)
def test_a_stop_text_ends_the_answer_outside_of_paths(stop: tuple[str, ...], text: str | None) -> None:
    whole = serve(SCRIPT, ask([TEXT], max_tokens=400))
    result = serve(SCRIPT, ask([TEXT], max_tokens=400, stop=stop))
    got = answer_text(result, toy_text)
    if text is None:
        assert result.token_ids == whole.token_ids and result.stop_reason is None and result.stops == []
        assert got == toy_text(result.token_ids)
        return
    head, dots, tail = text.partition("...")
    assert got.endswith(tail) if dots else got == head
    assert result.stop_reason in stop and result.finish_reason == "stop"
    (match,) = result.stops
    assert toy_text(result.token_ids[match.start : match.end]).startswith(match.kept + match.text)
    assert stop[0] in toy_text(result.token_ids), "its tokens stay: the model has read them"


def test_in_branches_a_stop_text_or_token_ends_the_path() -> None:
    request = ask([TEXT], max_tokens=400, stop=("lm",), stop_token_ids=(ids_of("o")[0],), stop_in_branches=True)
    result = serve(SCRIPT, request)
    assert result.finish_reason == "stop" and result.stop_reason is None
    first, second = result.blocks[0].branches
    assert (first.finish, first.stop_reason) == ("stop", "lm")
    assert (second.finish, second.stop_reason) == ("stop", ids_of("o")[0])
    text = answer_text(result, toy_text)
    assert "1:k\n</Path>" in text and "2:kl\n</Path>" in text and "defg" in text
    labelled = serve(SCRIPT, changed(request, stop=("<Path>\n2:k",)))
    assert [branch.finish for branch in labelled.blocks[0].branches] == ["path_end", "stop"]
    outside = serve(SCRIPT, changed(request, stop_in_branches=False))
    assert [branch.finish for branch in outside.blocks[0].branches] == ["path_end"] * 2


@pytest.mark.parametrize("text", ["</Goal>", "</Path>", "done\n</Goal>\n"])
def test_stop_texts_of_engines_that_do_not_fork_are_refused_where_this_one_does(text: str) -> None:
    with pytest.raises(GenerationError, match=r"ends in </(Goal|Path)>, at which this engine forks and joins"):
        serve(SCRIPT, ask([TEXT], max_tokens=400, stop=(text,)))
    engine = toy_engine(MODEL, sampler=ScriptedSampler([SCRIPT]))
    (plain,) = engine.generate([ask([TEXT], max_tokens=400, stop=("</Goal>",), max_depth=0)])
    assert plain.stop_reason == "</Goal>" and not plain.blocks
    tag = int(Tag.END_GOAL)
    engine = toy_engine(MODEL, sampler=ScriptedSampler([SCRIPT]))
    (by_token,) = engine.generate([ask([TEXT], max_tokens=400, stop_token_ids=(tag,), max_depth=0)])
    assert by_token.stop_reason == tag and [end.token for end in by_token.ends] == [tag]


def test_stop_texts_count_only_from_min_tokens_on() -> None:
    script = {(): [*ids_of("abcabcabc"), EOS]}
    for min_tokens, text in [(0, "a"), (3, "a"), (4, "abca"), (7, "abcabca"), (9, "abcabca")]:
        result = serve(script, ask([TEXT], max_tokens=50, min_tokens=min_tokens, stop=("bc",)))
        assert answer_text(result, toy_text) == text


def test_what_is_read_over_before_min_tokens_is_not_located(monkeypatch: pytest.MonkeyPatch) -> None:
    """That takes as long as the text is: done for each match, an answer would take the square of its length."""
    located, locate = [], StopScanner._locate

    def counted(scanner: StopScanner, ids: list[int], place: int, stop: str) -> StopMatch:
        located.append(len(ids))
        return locate(scanner, ids, place, stop)

    monkeypatch.setattr(StopScanner, "_locate", counted)
    result = serve({(): [*ids_of("a" * 90), EOS]}, ask([TEXT], max_tokens=100, min_tokens=80, stop=("a",)))
    assert len(result.token_ids) == 80 and located == [81]


@pytest.mark.parametrize("seed", range(30))
def test_random_texts_are_cut_where_a_plain_search_cuts_them(seed: int) -> None:
    """Bytes as tokens, characters of one to four bytes, stop texts that overlap themselves and each other."""
    rng = random.Random(seed)
    alphabet = "ab✓😀é\u0301"
    text = "".join(rng.choice(alphabet) for _ in range(rng.randint(1, 60)))
    stops = ["".join(rng.choice(alphabet) for _ in range(rng.randint(1, 4))) for _ in range(rng.randint(1, 3))]
    data = text.encode()

    def decode(ids: list[int]) -> str:
        return bytes(ids).decode(errors="replace")

    scanner, detokenizer, ids, known = StopScanner(stops, decode), IncrementalDetokenizer(decode), [7, 7], ""
    scanner.begin(2)
    while len(ids) < len(data) + 2:
        piece = data[len(ids) - 2 : len(ids) - 2 + rng.randint(1, 5)]
        ids += piece
        known += detokenizer.push(list(piece))
        match = scanner.find(ids, len(piece))
        starts = [known.find(stop) for stop in stops if stop in known]
        assert (match is not None) == bool(starts)
        if match is not None:
            assert decode(ids[2 : match.start]) + match.kept == text[: min(starts)]
            assert text[min(starts) :].startswith(match.text)
            return


@pytest.mark.parametrize("seed", range(12))
def test_answers_end_at_the_same_token_whatever_runs_beside(seed: int) -> None:
    rng = random.Random(seed)
    stop = tuple("".join(rng.choice("\nabcdefgh12:") for _ in range(rng.randint(1, 2))) for _ in range(2))
    options = {"stop_in_branches": rng.random() < 0.7, "min_tokens": rng.randint(0, 9)}
    request = ask(random_prompt(rng, 5), max_tokens=200, stop=stop, **options)
    first, *others = (
        toy_engine(MODEL, sampler=SoupSampler(seed), max_rows=rows, page_size=page_size).generate([asked])[0]
        for rows, page_size, asked in [
            (32, 1, request),
            (2, 16, request),
            (32, 16, changed(request, max_concurrent_branches=1)),
        ]
    )
    assert_balanced(first)
    for other in others:
        assert (other.token_ids, other.stops, other.stop_reason) == (first.token_ids, first.stops, first.stop_reason)
    for match in first.stops:
        assert toy_text(first.token_ids[match.start : match.end]).startswith(match.kept + match.text)


def test_n_answers_are_those_of_n_requests() -> None:
    model = ToyModel(2)
    together = toy_engine(model, page_size=4)
    several = ask([TEXT] * 9, n=3, temperature=2.0, max_tokens=30, prompt_logprobs=1, sample=5)
    single = [ask([TEXT] * 9, temperature=2.0, max_tokens=30, sample=5 + k) for k in range(3)]
    heard: list[int] = []
    results = together.generate([several, *single], on_token=lambda index, branch, ids: heard.append(index))
    assert [result.sample for result in results] == [5, 6, 7] * 2
    assert [r.token_ids for r in results[:3]] == [r.token_ids for r in results[3:]]
    assert len({tuple(r.token_ids) for r in results[:3]}) == 3
    assert {r.request_id for r in results} == set(range(6)) == set(heard)
    assert results[0].prompt_logprobs == results[2].prompt_logprobs and results[3].prompt_logprobs is None
    assert [r.cached_tokens for r in results] == [0, *[8] * 5], "all but the first take over two pages of four"
    assert_drained(together)
    together.add_request(several)
    together.cancel(7)
    ended = {result.request_id: result.finish_reason for result in drain(together)}
    assert ended[7] == "abort" and ended.keys() == {6, 7, 8} and {ended[6], ended[8]} <= {"stop", "length"}


def drain(engine: Engine) -> list[Result]:
    results = []
    while engine.has_work:
        results += engine.step()
    return results


def test_stop_texts_and_n_that_cannot_work_are_refused() -> None:
    for bad in ({"stop": ("",)}, {"n": 0}, {"n": 2}, {"stop": (3,)}, {"prompt_logprobs": -1}):
        with pytest.raises(GenerationError, match=next(iter(bad))):
            SamplingParams(**bad)  # type: ignore[arg-type]
    assert SamplingParams(stop="ab").stop == ("ab",)  # type: ignore[arg-type]
    with pytest.raises(GenerationError, match="detokenize"):
        Engine(MODEL, VOCAB, EngineConfig(num_pages=50)).add_request(ask([TEXT], stop=("a",)))
