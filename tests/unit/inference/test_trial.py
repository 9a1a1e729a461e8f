"""Tries: the first that succeed end the others, which give back what they hold and leave an answer that is exact."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megatron_multiverse.checkpoints.load import load_checkpoint
from megatron_multiverse.config import EngineConfig, SamplingParams
from megatron_multiverse.data.tokenizers import MultiverseTokenizer, build_tokenizer
from megatron_multiverse.errors import GenerationError
from megatron_multiverse.inference import Engine, Request, Result, Try
from megatron_multiverse.structure import Tag, lay_out, parse

from .test_engine import assert_balanced, goal
from .toy import (
    EOS,
    NEWLINE,
    TEXT,
    VOCAB,
    Script,
    ScriptedSampler,
    SoupSampler,
    ToyModel,
    ask,
    assert_drained,
    changed,
    force_preemption,
    forward_logits,
    ids_of,
    largest_difference,
    random_prompt,
    random_script,
    structure_positions,
    toy_engine,
    toy_text,
)

MODEL = ToyModel(6)

pytestmark = pytest.mark.usefixtures("overlap")


END = [int(Tag.END_CONCLUSION), NEWLINE, int(Tag.END_PARALLEL)]
END_PATH = int(Tag.END_PATH)
PREFIX = len("N<1:")  # newline, <Path>, newline and label are forced: five tokens with the second newline


def tries(*texts: str) -> Script:
    paths = {((0, k),): [*ids_of(text), END_PATH] for k, text in enumerate(texts)}
    return {(): [*goal(len(texts)), *ids_of("abc"), *END, *ids_of("de"), EOS], **paths}


def serve(script: Script, request: Request, **settings: object) -> tuple[Result, Engine, ScriptedSampler]:
    sampler = ScriptedSampler([script])
    engine = toy_engine(MODEL, sampler=sampler, **settings)
    (result,) = engine.generate([request])
    assert_drained(engine)
    return result, engine, sampler


@pytest.mark.parametrize("page_size", [1, 16])
def test_a_right_try_ends_two_wrong_ones_and_what_that_saves(page_size: int) -> None:
    script = tries("m" * 40, "kkvkk", "n" * 30)
    request = ask([TEXT] * 8, max_tokens=300, commit_after=1, commit_on="v")
    whole, _, _ = serve(script, changed(request, commit_after=0, commit_on=""), page_size=page_size)
    result, engine, sampler = serve(script, request, page_size=page_size)
    assert [branch.finish for branch in result.blocks[0].branches] == ["dropped", "path_end", "dropped"]
    text = toy_text(result.token_ids)
    assert "<Path>\n1:\n</Path>\n<Path>\n2:kkvkk</Path>\n<Path>\n3:\n</Path>" in text and "m" not in text
    # The longest path was 40 words long, the right one 5: each further word would have been one step.
    assert whole.decode_steps - result.decode_steps == 35
    # Each wrong try wrote as much as the right one, `</Path>` among it, when that ended.
    lost = [branch.dropped for branch in result.blocks[0].branches]
    assert lost[1] is None and lost[0] is not None and lost[2] is not None
    assert toy_text(lost[0].token_ids) == "\n<Path>\n1:mmmmmm" and toy_text(lost[2].token_ids) == "\n<Path>\n3:nnnnnn"
    shell = len(ids_of("1:")) + 3 + 2
    assert result.dropped_tokens == 2 * (5 + 6 - shell)
    if page_size == 1:
        # Of each, all that was fed but the forced beginning. In turn its last token was not fed yet.
        assert result.freed_pages == 2 * (6 - (not engine.overlap))
    assert result.critical_tokens == whole.critical_tokens - 35
    assert largest_difference(MODEL, sampler, [request], [result], tokens_only=True) < 1e-9
    for branch in (result.blocks[0].branches[0], result.blocks[0].branches[2]):
        assert branch.dropped is not None
        head = result.token_ids[: branch.start]
        partial = Result(**{**vars(result), "token_ids": [*head, *branch.dropped.token_ids]})
        logits = forward_logits(MODEL, request.prompt_ids, partial)
        for k in range(PREFIX + 1, len(branch.dropped.token_ids)):
            logprob = logits[len(request.prompt_ids) + branch.start + k - 1].log_softmax(-1)[
                branch.dropped.token_ids[k]
            ]
            own = branch.dropped.logprobs[k]
            assert own is not None and abs(logprob.item() - own) < 1e-9


def test_k_of_b_keeps_what_had_ended_and_ties() -> None:
    script = tries("a" * 9, "bbb", "c" * 5, "dd", "e" * 5)
    finishes = {
        1: ["dropped", "dropped", "dropped", "path_end", "dropped"],
        2: ["dropped", "path_end", "dropped", "path_end", "dropped"],
        3: ["dropped", "path_end", "path_end", "path_end", "path_end"],
        5: ["path_end"] * 5,
    }
    for count, expected in finishes.items():
        result, _, _ = serve(script, ask([TEXT], max_tokens=300, commit_after=count))
        assert [branch.finish for branch in result.blocks[0].branches] == expected
    # A wrong path that ended before the right one stays, and where none is right all are joined.
    wrong, _, _ = serve(script, ask([TEXT], max_tokens=300, commit_after=1, commit_on="ccc"))
    assert [branch.finish for branch in wrong.blocks[0].branches] == ["dropped", *["path_end"] * 4]
    none, _, _ = serve(script, ask([TEXT], max_tokens=300, commit_after=1, commit_on="zz"))
    assert [branch.finish for branch in none.blocks[0].branches] == ["path_end"] * 5


def test_a_predicate_of_ones_own_and_one_that_raises() -> None:
    seen: list[Try] = []

    def accept(attempt: Try) -> bool:
        seen.append(attempt)
        return len(attempt.text) > 20

    script = tries("a" * 9, "bbb", "c" * 5)
    sampling = SamplingParams(max_tokens=300, commit_after=1)
    result, _, _ = serve(script, Request(prompt_ids=[TEXT], sampling=sampling, accept=accept))
    assert [branch.finish for branch in result.blocks[0].branches] == ["dropped", "path_end", "path_end"]
    assert seen[0] == ("2", "2:", "\n<Path>\n2:bbb</Path>")

    def broken(attempt: Try) -> bool:
        raise ValueError("no verdict")

    engine = toy_engine(MODEL, sampler=ScriptedSampler([script]))
    (failed,) = engine.generate([Request(prompt_ids=[TEXT], sampling=sampling, accept=broken)])
    assert failed.finish_reason == "error" and "accept raised ValueError('no verdict')" in failed.error
    assert_balanced(failed)
    assert_drained(engine)


def by_length(remainder: int) -> Callable[[Try], bool]:
    return lambda attempt: len(attempt.text) % 3 != remainder


SCHEDULES = [
    {"page_size": 1},
    {"page_size": 16, "max_rows": 3},
    {"page_size": 16, "max_step_tokens": 7},
    {"page_size": 64, "max_rows": 2},
]


@pytest.mark.parametrize("seed", range(6))
def test_random_trees_are_exact_and_the_same_whatever_runs_beside(seed: int) -> None:
    rng = random.Random(seed)
    script = random_script(rng, depth=rng.choice([1, 2, 2, 3]), blocks=2, most_paths=4, text=8)
    sampling = SamplingParams(max_tokens=3000, commit_after=rng.choice([1, 1, 2]))
    request = Request(prompt_ids=random_prompt(rng), sampling=sampling, accept=by_length(seed % 3))
    answers = []
    for number, settings in enumerate([*SCHEDULES, SCHEDULES[0]]):
        asked = changed(request, max_concurrent_branches=1) if number == 4 else request
        sampler = ScriptedSampler([script])
        engine = toy_engine(MODEL, sampler=sampler, num_pages=9600 // int(settings["page_size"]), **settings)
        engine.add_request(asked)
        results, steps, preempt_at = [], 0, set(rng.sample(range(5, 60), 2))
        while engine.has_work:
            results += engine.step()
            steps += 1
            if number % 2 and steps in preempt_at and engine.scheduler.active:
                force_preemption(engine)
        (result,) = results
        assert result.finish_reason == "stop" and set(result.malformed) <= {"forced_close", "unclosed"}
        assert largest_difference(MODEL, sampler, [request], [result], tokens_only=True) < 1e-9
        assert result.position_ids == structure_positions(request.prompt_ids, result)
        lay_out(parse(result.token_ids, VOCAB, strict=True))
        assert_drained(engine)
        answers.append(result)
    for other in answers[1:]:
        assert other.token_ids == answers[0].token_ids
        assert other.dropped_tokens == answers[0].dropped_tokens
        assert dropped_texts(other) == dropped_texts(answers[0])


def dropped_texts(result: Result) -> list[object]:
    paths = [branch for block in result.blocks for branch in block.branches]
    return [(path.path, path.finish, path.dropped and path.dropped[:2]) for path in paths]


@pytest.mark.parametrize("seed", range(15))
def test_budgets_hold_and_cut_at_the_same_token(seed: int) -> None:
    rng = random.Random(seed)
    sampling = SamplingParams(
        max_tokens=rng.randint(20, 300), max_critical_tokens=rng.choice([None, 60]), commit_after=1
    )
    request = Request(prompt_ids=[TEXT], sampling=sampling, accept=by_length(seed % 3))
    first, *others = (
        toy_engine(MODEL, sampler=SoupSampler(seed), max_rows=rows, page_size=page_size).generate([asked])[0]
        for rows, page_size, asked in [
            (32, 1, request),
            (2, 16, request),
            (32, 16, changed(request, max_concurrent_branches=1)),
        ]
    )
    assert_balanced(first)
    assert len(first.token_ids) + first.dropped_tokens <= sampling.max_tokens
    for other in others:
        assert other.token_ids == first.token_ids and other.dropped_tokens == first.dropped_tokens


def test_what_is_dropped_counts_among_no_malformed_output() -> None:
    """Path after path, the first try is closed at its budget before the second one succeeds, and is dropped then."""
    request = ask([TEXT], max_tokens=110, commit_after=1)
    at_once, _, _ = serve(tries("m" * 80, "kkvkk"), request)
    in_turn, _, _ = serve(tries("m" * 80, "kkvkk"), changed(request, max_concurrent_branches=1))
    assert in_turn.decode_steps > at_once.decode_steps + 20 and in_turn.token_ids == at_once.token_ids
    assert [branch.finish for branch in in_turn.blocks[0].branches] == ["dropped", "path_end"]
    assert in_turn.malformed == at_once.malformed == {}


def test_policies_that_cannot_work_are_refused() -> None:
    with pytest.raises(GenerationError, match="commit_after"):
        SamplingParams(commit_after=-1)
    with pytest.raises(GenerationError, match="commit_after"):
        SamplingParams(commit_on="v")
    with pytest.raises(GenerationError, match="commit_after"):
        Request(prompt_ids=[1], accept=lambda attempt: True)


QUICKSTART = Path(__file__).parents[3] / "examples" / "quickstart" / "model"


@pytest.mark.parametrize("page_size", [1, 16])
def test_what_a_right_try_saves_on_the_quickstart_task(page_size: int) -> None:
    """Three tries of one product, two of them wrong and longer: `= 1828` ends them."""
    tokenizer = build_tokenizer("HuggingFaceTokenizer", QUICKSTART)
    vocab = tokenizer.structure_vocab
    head = "\n".join(f"<Outline>\n{k}: A = 914 * 2\n</Outline>" for k in (1, 2, 3))
    wrong = "ones: 4 * 2 + 0 = 9, write 9, carry 0, left 91 * 2\ntens: 1 * 2 + 0 = 2\nA = 1829\n</Path>"
    right = "914 + 914\nA = 1828\n</Path>"
    texts = {
        (): f"<Parallel>\n<Goal>\n{head}\n</Goal>",
        ((0, 0),): f" A = 914 * 2\n{wrong}",
        ((0, 1),): f" A = 914 * 2\n{right}",
        ((0, 2),): f" A = 2 * 914\n{wrong}",
    }
    script = {path: tokenizer.tokenize(text) for path, text in texts.items()}
    script[()] += [*tokenizer.tokenize("A = 1828\n</Conclusion>\n</Parallel>\n"), vocab.eos_id or 0]
    prompt = tokenizer.tokenize("Work out A = 914 * 2. Think step by step and in parallel before answering.\n")
    results = []
    for commit_after in (0, 1):
        model, _ = load_checkpoint(QUICKSTART, dtype=torch.float64)
        config = EngineConfig(page_size=page_size, num_pages=4096 // page_size, overlap=False, debug=True)
        engine = Engine(model, vocab, config, sampler=ScriptedSampler([script]), detokenize=tokenizer.detokenize)
        on = {"commit_after": 1, "commit_on": "= 1828"} if commit_after else {}
        results += engine.generate([ask(prompt, max_tokens=600, **on)])
        assert_drained(engine)
    whole, early = results
    long, short = len(script[(0, 0),]), len(script[(0, 1),])
    assert [branch.finish for branch in early.blocks[0].branches] == ["dropped", "path_end", "dropped"]
    assert whole.decode_steps - early.decode_steps == max(long, len(script[(0, 2),])) - short
    assert whole.critical_tokens - early.critical_tokens == max(long, len(script[(0, 2),])) - short
    # Each wrong try had drawn as many tokens as the right one; all but the last were in the cache.
    base = len(prompt) + early.blocks[0].branches[0].start
    prefix = len(vocab.path_prefix(vocab_label(tokenizer, "1:")))
    held, kept = base + prefix + short - 1, base + prefix
    assert early.freed_pages == 2 * (-(-held // page_size) - -(-kept // page_size))
    assert early.dropped_tokens == 2 * (short - 2)  # its two closing tokens stand in the answer instead
    assert whole.freed_pages == whole.dropped_tokens == 0


def vocab_label(tokenizer: MultiverseTokenizer, label: str) -> list[int]:
    return tokenizer.tokenize_response(f"<Path>\n{label}")[2:]
