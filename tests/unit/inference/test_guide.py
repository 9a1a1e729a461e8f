"""Answers held to a grammar are what it says, whatever is drawn, and what they think is free."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models

pytest.importorskip("llguidance")

from megatron_multiverse.config import EngineConfig, SamplingParams
from megatron_multiverse.data.tokenizers import HuggingFaceTokenizer
from megatron_multiverse.errors import GenerationError
from megatron_multiverse.inference import Engine, Request, Result
from megatron_multiverse.inference.build import build_engine, grammars_of
from megatron_multiverse.inference.first_requests import warm_up
from megatron_multiverse.inference.step.plan import Shaping, StepPlan
from megatron_multiverse.inference.step.reference import edited_logits
from megatron_multiverse.inference.step.shaping import edit_logits
from megatron_multiverse.inference.text.answer import answer_text
from megatron_multiverse.inference.text.guide import Grammars, Guide
from megatron_multiverse.structure import Tag

from .recorded import record_steps
from .toy import force_preemption

MODEL = Path(__file__).parents[3] / "examples" / "quickstart" / "model"
PROMPT = "Work out A = 583 + 967; B = 48 + 76. Think step by step and in parallel before answering."
PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 9}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def tokenizer() -> HuggingFaceTokenizer:
    torch.set_num_threads(1)
    return HuggingFaceTokenizer(MODEL)


@pytest.fixture(scope="module", params=[False, True], ids=["in_turn", "overlapped"])
def engine(request: pytest.FixtureRequest, tokenizer: HuggingFaceTokenizer) -> Iterator[Engine]:
    config = EngineConfig(num_pages=600, overlap=request.param, debug=True)
    yield build_engine(MODEL, tokenizer, config)


def ask(tokenizer: HuggingFaceTokenizer, prompt: str, **sampling: Any) -> Request:
    return Request(prompt_ids=tokenizer.tokenize(prompt), sampling=SamplingParams(**{"max_tokens": 900, **sampling}))


def said(tokenizer: HuggingFaceTokenizer, result: Result) -> str:
    """What an answer says once it has thought."""
    return answer_text(result, tokenizer.detokenize).rpartition("</Think>")[2]


def test_text_is_what_the_grammar_says_and_thought_is_free(engine: Engine, tokenizer: HuggingFaceTokenizer) -> None:
    schema = json.dumps(PERSON)
    thinks = ask(tokenizer, PROMPT, grammar=schema)
    free = ask(tokenizer, PROMPT)
    does_not = {"logit_bias": {tokenizer.structure_vocab.tag_ids[Tag.THINK]: -100.0}, "temperature": 1.0, "n": 4}
    gbnf = 'root ::= "(" [0-9]+ ")" | "[" root "]"'
    others = [
        ask(tokenizer, "abc", grammar=schema, **does_not),
        ask(tokenizer, "abc", grammar=r"[a-c]{3}-\d{2,4}", grammar_kind="regex", **does_not),
        ask(tokenizer, "abc", grammar='["yes", "no", "may be"]', grammar_kind="choice", seed=2, **does_not),
        ask(tokenizer, "abc", grammar=gbnf, grammar_kind="grammar", max_tokens=200, **does_not),
    ]
    results = engine.generate([thinks, free, *others])
    thought, text, drawn = results[0], results[1], results[2:]
    assert thought.finish_reason == "stop" and sorted(json.loads(said(tokenizer, thought))) == ["age", "name"]
    blocks = [[branch.outline for branch in block.branches] for block in thought.blocks]
    assert blocks == [["1:", "2:"]] == [[branch.outline for branch in block.branches] for block in text.blocks]
    end = thought.token_ids.index(tokenizer.structure_vocab.tag_ids[Tag.END_THINK])
    assert thought.token_ids[: end + 1] == text.token_ids[: end + 1]
    whole = [answer_text(result, tokenizer.detokenize) for result in drawn]
    ends = {result.finish_reason for result in drawn[:12]}
    assert ends == {"stop"}
    for each in whole[:4]:
        person = json.loads(each)
        assert sorted(person) == ["age", "name"] and 0 <= person["age"] <= 99 and len(person["name"]) <= 9
    assert len(set(whole[:4])) > 1
    assert all(re.fullmatch(r"[a-c]{3}-\d{2,4}", each) for each in whole[4:8])
    assert {"yes", "no", "may be"} >= set(whole[8:12]) and len(set(whole[8:12])) > 1
    for each, result in zip(whole[12:], drawn[12:], strict=True):
        assert re.match(r"\[*(\(\d*\)?)?\]*$", each)
        assert result.finish_reason != "stop" or re.fullmatch(r"(\[*)\(\d+\)(\]*)", each)


def test_a_prompt_may_open_the_thought(engine: Engine, tokenizer: HuggingFaceTokenizer) -> None:
    """The answer is that of a model that opens it itself: blocks fork in it, and what comes behind it is held."""
    schema = json.dumps(PERSON)
    free, held = (ask(tokenizer, f"{PROMPT}<Think>", **extra) for extra in ({}, {"grammar": schema}))
    eos = tokenizer.structure_vocab.eos_id
    assert eos is not None
    early = ask(tokenizer, f"{PROMPT}<Think>", grammar=schema, logit_bias={eos: 100.0}, max_tokens=80)
    tight = ask(tokenizer, f"{PROMPT}<Think>", grammar=schema, logit_bias={eos: 100.0}, max_tokens=1)
    after = replace(held, thought="closed")
    silent = ask(tokenizer, f"{PROMPT}<Think>", logit_bias={eos: 100.0})
    quoted = ask(tokenizer, f"What is <Think>? {PROMPT}", grammar=schema)
    results = engine.generate([ask(tokenizer, PROMPT), free, held, early, tight, after, silent, quoted])
    itself, opened, guided, ended, cut, after_it, said_nothing, plain = results
    think, end_think = (tokenizer.structure_vocab.tag_ids[tag] for tag in (Tag.THINK, Tag.END_THINK))
    assert itself.token_ids == [think, *opened.token_ids]
    assert len(opened.blocks) == len(guided.blocks) == 1 and not opened.malformed and not guided.malformed
    end = guided.token_ids.index(end_think)
    assert guided.token_ids[: end + 1] == opened.token_ids[: end + 1]
    for result in (guided, ended):
        assert result.finish_reason == "stop" and sorted(json.loads(said(tokenizer, result))) == ["age", "name"]
    assert tokenizer.detokenize(ended.token_ids).startswith("\n</Think>{") and ended.logprobs[:2] == [None, None]
    assert ended.malformed == {"forced_close": 1} and len(cut.token_ids) <= 1
    assert sorted(json.loads(tokenizer.detokenize(after_it.token_ids))) == ["age", "name"]
    assert not said_nothing.token_ids and said_nothing.malformed == {"unclosed": 1}, "which no reward is for"
    assert sorted(json.loads(said(tokenizer, plain))) == ["age", "name"], "a tag that is quoted opens nothing"
    with pytest.raises(GenerationError, match="thought is 'opened'; give one of none, open, closed"):
        replace(held, thought="opened")


def test_answers_are_the_same_alone_and_after_stepping_back(engine: Engine, tokenizer: HuggingFaceTokenizer) -> None:
    requests = [
        ask(tokenizer, PROMPT, grammar=json.dumps(PERSON), temperature=0.7, seed=seed, repetition_penalty=1.1, top_k=40)
        for seed in range(2)
    ] + [ask(tokenizer, PROMPT, seed=5, temperature=0.7)]
    alone = [engine.generate([request])[0].token_ids for request in requests]
    numbers = {engine.add_request(request): k for k, request in enumerate(requests)}
    steps, found = 0, {}
    while engine.has_work:
        found.update((numbers[result.request_id], result.token_ids) for result in engine.step())
        steps += 1
        if steps % 40 == 0 and engine.scheduler.active:
            force_preemption(engine)
    assert steps > 80 and [found[k] for k in range(3)] == alone


def test_steps_by_graphs_draw_the_same(
    engine: Engine, tokenizer: HuggingFaceTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rows of a step that are held to nothing have a graph again once the others have ended."""
    requests = [
        ask(tokenizer, PROMPT, grammar=json.dumps(PERSON), temperature=0.7, seed=3),
        ask(tokenizer, PROMPT, temperature=0.7, seed=4),
        ask(tokenizer, "abc", grammar="[ab]{9}", grammar_kind="regex", max_tokens=30),
    ]
    want = [result.token_ids for result in engine.generate(requests)]
    recorded = build_engine(MODEL, tokenizer, EngineConfig(num_pages=600, overlap=True, debug=True))
    graphs = record_steps(recorded, monkeypatch)
    assert [result.token_ids for result in recorded.generate(requests)] == want
    assert {"logits", "noise"} <= {kind.draw for kind in graphs.graphs} and graphs.replays > 100


@pytest.mark.parametrize("early", [False, True])
def test_what_is_drawn_ahead_of_the_end_of_a_thought_is_drawn_again(
    tokenizer: HuggingFaceTokenizer, early: bool
) -> None:
    """With overlap a step runs before `</Think>` is known; the answer is that of steps in turn, also where the model
    ends its text within the thought, which ends nothing but that."""
    eos = tokenizer.structure_vocab.eos_id
    assert eos is not None
    bias = {"logit_bias": {eos: 40.0}} if early else {}
    answers = []
    for overlap in (False, True):
        engine = build_engine(MODEL, tokenizer, EngineConfig(num_pages=600, overlap=overlap, debug=True))
        requests = [
            ask(tokenizer, PROMPT, grammar=json.dumps(PERSON), temperature=0.8, seed=seed, **bias) for seed in range(4)
        ]
        answers.append(engine.generate([*requests, ask(tokenizer, PROMPT, seed=9, temperature=0.8)]))
        assert not engine.scheduler.active and engine.book.available == 600
    assert [result.token_ids for result in answers[0]] == [result.token_ids for result in answers[1]]
    for one, other in zip(*answers, strict=True):
        drawn = [np.array([logprob for logprob in each.logprobs if logprob is not None]) for each in (one, other)]
        np.testing.assert_allclose(*drawn, rtol=0, atol=1e-4)
    closed = [result.malformed["forced_close"] > 0 for result in answers[0][:4]]
    assert any(closed) is early
    for result in answers[0][:4]:
        assert result.finish_reason == "stop" and sorted(json.loads(said(tokenizer, result))) == ["age", "name"]


@pytest.mark.parametrize("leave_open", [False, True])
def test_budgets_hold_where_a_thought_is_closed(
    engine: Engine, tokenizer: HuggingFaceTokenizer, leave_open: bool
) -> None:
    eos = tokenizer.structure_vocab.eos_id
    assert eos is not None
    params: dict[str, Any] = {"grammar": "[0-9]{3}", "grammar_kind": "regex", "logit_bias": {eos: 60.0}}
    params |= {"leave_open": True, "max_depth": 0} if leave_open else {}
    for most in range(3, 9):
        (result,) = engine.generate([ask(tokenizer, PROMPT, max_tokens=most, **params)])
        assert len(result.token_ids) <= most
        is_whole = re.fullmatch("[0-9]{3}", said(tokenizer, result)) is not None
        assert is_whole is (result.finish_reason == "stop") is (most >= 6)


def test_where_a_grammar_holds(tokenizer: HuggingFaceTokenizer) -> None:
    tag = tokenizer.structure_vocab.tag_ids
    guide = begin(tokenizer, grammar="[ab]", grammar_kind="regex")
    a, b = (tokenizer.tokenize(text)[0] for text in "ab")
    assert allowed(guide, tokenizer) == {tag[Tag.THINK], a, b}
    assert guide.holds
    for token in (tag[Tag.THINK], tag[Tag.PARALLEL], a, b, tag[Tag.END_PARALLEL]):
        guide.push(token)
        assert not guide.holds
    guide.push(tag[Tag.END_THINK])
    assert guide.holds and allowed(guide, tokenizer) == {a, b} and not guide.is_complete
    guide.push(b)
    assert guide.is_complete and not guide.error


def test_tags_are_text_of_no_grammar_and_ends_come_where_it_may_end(tokenizer: HuggingFaceTokenizer) -> None:
    guide = begin(tokenizer, grammar="[0-9]*x?", grammar_kind="regex", stop_token_ids=(7,))
    digits = {tokenizer.tokenize(str(digit))[0] for digit in range(10)} | set(tokenizer.tokenize("x"))
    ends = {tokenizer.structure_vocab.eos_id, 7}
    assert allowed(guide, tokenizer) == digits | ends | {tokenizer.structure_vocab.tag_ids[Tag.THINK]}
    guide.push(tokenizer.tokenize("4")[0])
    assert allowed(guide, tokenizer) == digits | ends
    guide = begin(tokenizer, grammar=r"(.|\n)*", grammar_kind="regex")
    guide.push(tokenizer.tokenize("4")[0])
    assert not allowed(guide, tokenizer) & set(tokenizer.structure_vocab.tag_of)


def test_json_has_no_blanks_between_its_parts_unless_asked(tokenizer: HuggingFaceTokenizer) -> None:
    blank, brace = tokenizer.tokenize(" ")[0], tokenizer.tokenize("{")[0]
    for schema, may in (({"type": "object"}, False), ({"x-guidance": {"whitespace_flexible": True}}, True)):
        guide = begin(tokenizer, grammar=json.dumps({"type": "object"} | schema))
        guide.push(brace)
        assert (blank in allowed(guide, tokenizer)) is may


def test_a_token_that_breaks_the_grammar_is_an_error(tokenizer: HuggingFaceTokenizer) -> None:
    guide = begin(tokenizer, grammar="[ab]", grammar_kind="regex")
    guide.push(tokenizer.tokenize("4")[0])
    assert "grammar" in guide.error


def begin(tokenizer: HuggingFaceTokenizer, **sampling: Any) -> Guide:
    grammars = grammars_of(tokenizer)
    assert grammars is not None
    params = SamplingParams(**sampling)
    return grammars.begin(params, frozenset((tokenizer.structure_vocab.eos_id or 0, *params.stop_token_ids)))


def allowed(guide: Guide, tokenizer: HuggingFaceTokenizer) -> set[int]:
    bits = np.unpackbits(guide.mask().view(np.uint8), bitorder="little")[: tokenizer.vocab_size]
    return set(np.flatnonzero(bits).tolist())


@pytest.mark.parametrize(
    ("kind", "text", "found"),
    [
        ("json_schema", "{", "json_schema"),
        ("json_schema", '{"type": "objekt"}', "objekt"),
        ("json_schema", "[]", "json_schema"),
        ("regex", "((", "unclosed group"),
        ("choice", "yes", "choice"),
        ("grammar", "this is none", "grammar"),
    ],
)
def test_grammars_that_cannot_be_read_are_refused(
    engine: Engine, tokenizer: HuggingFaceTokenizer, kind: str, text: str, found: str
) -> None:
    with pytest.raises(GenerationError, match="cannot be read") as error:
        engine.add_request(ask(tokenizer, "abc", grammar=text, grammar_kind=kind))
    assert found in str(error.value) and not engine.has_work


def test_tokenizers_that_are_not_read_are_told_and_keep_no_engine_from_its_start(
    engine: Engine, tokenizer: HuggingFaceTokenizer
) -> None:
    words = Tokenizer(models.WordLevel({piece: k for k, piece in enumerate(tokenizer.id_to_text)}, "a")).to_str()
    vocab = tokenizer.structure_vocab
    grammars = Grammars(words, vocab, tokenizer.vocab_size)
    made = Engine(engine.runner.model, vocab, EngineConfig(num_pages=64), grammars=grammars)
    warm_up(made)
    with pytest.raises(GenerationError, match="llguidance does not read"):
        made.add_request(ask(tokenizer, "a", grammar="a", grammar_kind="regex", max_tokens=4))


def test_without_an_end_of_text_no_id_stands_for_it(tokenizer: HuggingFaceTokenizer) -> None:
    vocab = replace(tokenizer.structure_vocab, eos_id=None)
    grammars = Grammars(tokenizer.to_json(), vocab, tokenizer.vocab_size)
    guide = grammars.begin(SamplingParams(grammar=r"[\s\S]*", grammar_kind="regex"), frozenset())
    guide.push(tokenizer.tokenize("a")[0])
    bytes_of_text = set(range(tokenizer.vocab_size)) - set(vocab.tag_of)
    assert 0 in allowed(guide, tokenizer) <= bytes_of_text
    guide.push(0)
    assert not guide.is_complete and not guide.error


def test_what_does_not_go_together_is_refused(engine: Engine, tokenizer: HuggingFaceTokenizer) -> None:
    for params in ({"ignore_eos": True}, {"min_tokens": 3}, {"grammar_kind": "xml"}):
        with pytest.raises(GenerationError, match="grammar"):
            SamplingParams(**{"grammar": "a", "grammar_kind": "regex", **params})
    without = Engine(engine.runner.model, tokenizer.structure_vocab, EngineConfig(num_pages=4))
    with pytest.raises(GenerationError, match="grammars="):
        without.add_request(ask(tokenizer, "a", grammar="a", grammar_kind="regex", max_tokens=4))
    sampling = SamplingParams(grammar="[ab]{2}", grammar_kind="regex")
    for start, problem in (("x", "token 0 .* breaks"), ("ab", "token 1 .* completes")):
        with pytest.raises(GenerationError, match=problem):
            engine.check(Request(prompt_ids=[1], sampling=sampling, answer_start=tokenizer.tokenize(start)))
    (result,) = engine.generate([Request(prompt_ids=[1], sampling=sampling, answer_start=tokenizer.tokenize("b"))])
    assert re.fullmatch("b[ab]", answer_text(result, tokenizer.detokenize))


@pytest.mark.parametrize("seed", range(8))
def test_logits_lose_what_grammars_forbid(seed: int) -> None:
    """Beside biases and penalties, as the plain reference says; masks may reach less far than logits, or further."""
    rng, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    rows, vocab, words = int(rng.integers(1, 6)), int(rng.choice([40, 64, 100])), int(rng.integers(1, 5))
    logits = torch.randn(rows, vocab, generator=generator)
    guided = np.flatnonzero(rng.random(rows) < 0.7)
    bias_rows = np.flatnonzero(rng.random(rows) < 0.5)
    masks = rng.integers(-(2**31), 2**31, (len(guided), words), dtype=np.int32)
    none, off, one = np.zeros(0, dtype=np.int64), np.zeros(rows), np.ones(len(guided))
    shaping = Shaping(
        top_k=off.astype(np.int64), top_p=off + 1, min_p=off, num_logprobs=off.astype(np.int64), bias_rows=bias_rows,
        bias_ids=bias_rows * 3, biases=bias_rows + 0.5, penalised=guided, repetition=1.5 * one, presence=0 * one,
        frequency=0.3 * one, coming=np.full(len(guided), -1), seen_rows=np.arange(len(guided)), seen_ids=guided + 2,
        seen_counts=guided + 1, exempt=none, guided=guided, masks=masks.reshape(-1),
    )  # fmt: skip
    edited = edit_logits(logits, shaping, torch.zeros(rows, dtype=torch.int64))
    for row in range(rows):
        penalties: dict[str, Any] = {}
        seen, fitting = {}, None
        if row in guided:
            bits = np.unpackbits(masks[list(guided).index(row)].view(np.uint8), bitorder="little")
            fitting = set(np.flatnonzero(bits).tolist())
            penalties, seen = {"repetition_penalty": 1.5, "frequency_penalty": 0.3}, {row + 2: row + 1}
        params = SamplingParams(logit_bias={row * 3: row + 0.5} if row in bias_rows else {}, **penalties)
        want = edited_logits(logits[row].double().numpy(), params, seen=seen, fitting=fitting)
        np.testing.assert_allclose(edited[row].double().numpy(), want)


def test_masks_travel_with_their_plan(
    engine: Engine, tokenizer: HuggingFaceTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    plans: list[StepPlan] = []
    launch = engine.runner.launch
    monkeypatch.setattr(engine.runner, "launch", lambda plan, *rest: plans.append(plan) or launch(plan, *rest))
    plain = ask(tokenizer, "abc", max_tokens=5)
    engine.generate([plain, ask(tokenizer, "abc", grammar="[ab]{4}", grammar_kind="regex", max_tokens=5), plain])
    guided = [plan for plan in plans if plan.sampling.shaping is not None and len(plan.sampling.shaping.guided)]
    assert guided
    for plan in guided:
        before, after = plan.sampling.shaping, StepPlan.from_bytes(plan.to_bytes()).sampling.shaping
        assert before is not None and after is not None and len(before.masks) == -(-tokenizer.vocab_size // 32)
        assert np.array_equal(before.guided, after.guided) and np.array_equal(before.masks, after.masks)
