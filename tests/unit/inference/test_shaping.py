"""Everything that can be asked of a draw, in every combination, against one plain float64 row at a time."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch

from megatron_multiverse.config import SamplingParams
from megatron_multiverse.errors import GenerationError
from megatron_multiverse.inference import CounterSampler, Request, Result, SamplingArrays
from megatron_multiverse.inference.step.reference import draw, edited_logits, gumbel
from megatron_multiverse.inference.text.branch import BranchPath, branch_key
from megatron_multiverse.kernels.sampling import gumbel_noise
from megatron_multiverse.structure import Tag

from .test_engine import goal
from .toy import (
    EOS,
    NEWLINE,
    TEXT,
    VOCAB,
    VOCAB_SIZE,
    Script,
    ScriptedSampler,
    SoupSampler,
    ToyModel,
    ask,
    assert_drained,
    force_preemption,
    forward_logits,
    random_prompt,
    toy_engine,
)

MODEL = ToyModel(5)


def random_params(rng: random.Random, **fixed: object) -> SamplingParams:
    """Each thing that can be asked is asked with probability one half."""

    def maybe(value: object, otherwise: object) -> object:
        return value if rng.random() < 0.5 else otherwise

    asked: dict[str, object] = {
        "temperature": maybe(rng.uniform(0.5, 2), 0.0),
        "top_k": maybe(rng.randint(1, 30), 0),
        "top_p": maybe(rng.uniform(0.3, 1), 1.0),
        "min_p": maybe(rng.uniform(0, 0.3), 0.0),
        "repetition_penalty": maybe(rng.uniform(0.7, 1.6), 1.0),
        "presence_penalty": maybe(rng.uniform(-2, 2), 0.0),
        "frequency_penalty": maybe(rng.uniform(-1, 2), 0.0),
        "logit_bias": maybe({rng.randrange(VOCAB_SIZE): rng.uniform(-9, 9) for _ in range(5)}, {}),
        "logprobs": maybe(rng.randint(1, 20), 0),
        "min_tokens": maybe(rng.randint(1, 40), 0),
        "seed": rng.randrange(1000),
    }
    return SamplingParams(**{"max_tokens": 120, **asked, **fixed})  # type: ignore[arg-type]


def assert_drawn_as_the_reference_draws(
    request: Request, result: Result, free: set[tuple[int, int]] | None = None
) -> int:
    """Draw every token of an answer again, from one forward over the answer; returns how many.

    free: (key of a branch, index of a draw) of the draws that no script decided; None for all.
    """
    count = 0
    params, prompt = request.sampling, len(request.prompt_ids)
    logits = forward_logits(MODEL, request.prompt_ids, result).double().numpy()
    paths: list[BranchPath] = [()] * len(result.token_ids)
    for block in result.blocks:
        for branch in block.branches:
            paths[branch.start : branch.end] = [branch.path] * (branch.end - branch.start)
    drawn = np.array(result.sampled, dtype=bool)
    labels, ids = np.array(result.labels), np.array(result.token_ids)
    for index in np.flatnonzero(drawn).tolist():
        visible = drawn[:index] & (labels[:index] <= labels[index])
        seen = dict.fromkeys(request.prompt_ids, 0)
        for token in ids[:index][visible].tolist():
            seen[token] = seen.get(token, 0) + 1
        root_tokens_so_far = index if paths[index] == () else params.min_tokens
        banned = [EOS] if root_tokens_so_far < params.min_tokens else []
        row = logits[prompt + result.parents[index]]
        edited = edited_logits(row, params, seen=seen, banned=banned, exempt=VOCAB.tag_ids)
        number = sum(drawn[k] and paths[k] == paths[index] for k in range(index))
        key = branch_key(params.seed, request.sample, paths[index])
        if free is not None and (key, number) not in free:
            continue
        count += 1
        assert draw(edited, params, key=key, index=number) == result.token_ids[index]
        own = row - np.logaddexp.reduce(row)
        if params.logprobs:
            assert result.top_logprobs is not None
            top = result.top_logprobs[index]
            assert top is not None and len(top) == params.logprobs
            np.testing.assert_allclose([value for _, value in top], -np.sort(-own)[: params.logprobs], atol=1e-9)
            np.testing.assert_allclose([value for _, value in top], own[[token for token, _ in top]], atol=1e-9)
        else:
            assert result.top_logprobs is None
    return count


@pytest.mark.usefixtures("overlap")
@pytest.mark.parametrize("seed", range(4))
def test_every_combination_is_drawn_as_the_reference_draws_it(seed: int) -> None:
    """Rows that ask for different things share the steps, and one request steps back on the way."""
    rng = random.Random(seed)
    requests = [
        Request(prompt_ids=random_prompt(rng, 12), sampling=random_params(rng, max_tokens=40), sample=k)
        for k in range(12)
    ]
    engine = toy_engine(MODEL, page_size=rng.choice([1, 16]), max_rows=rng.choice([3, 32]))
    index = {engine.add_request(request): k for k, request in enumerate(requests)}
    results = {}
    for step in range(10_000):
        if step == 15:
            force_preemption(engine)
        results.update((index[result.request_id], result) for result in engine.step())
        if not engine.has_work:
            break
    assert sum(result.preemptions for result in results.values()) == 1
    for k, request in enumerate(requests):
        assert_drawn_as_the_reference_draws(request, results[k])
    assert_drained(engine)


class FreeWords(ScriptedSampler):
    """The scripts write the structure, `-1` in them lets the engine's own sampler draw a word."""

    def __init__(self, scripts: Sequence[Script]) -> None:
        super().__init__(scripts)
        self.free = {(key, k) for key, ids in self.scripts.items() for k, token in enumerate(ids) if token == -1}

    def __call__(self, logits: torch.Tensor, sampling: SamplingArrays) -> tuple[torch.Tensor, torch.Tensor]:
        scripted, _ = super().__call__(logits, sampling)
        drawn, logprobs = CounterSampler()(logits, sampling)
        pairs = zip(sampling.keys.tolist(), sampling.indices.tolist(), strict=True)
        return torch.where(torch.tensor([pair in self.free for pair in pairs]), drawn, scripted), logprobs


@pytest.mark.usefixtures("overlap")
def test_a_path_starts_from_its_parents_counts_and_the_conclusion_from_those_of_all_paths() -> None:
    words = [-1] * 6
    end = [*words, int(Tag.END_CONCLUSION), NEWLINE, int(Tag.END_PARALLEL), *words, EOS]
    script = {(): [*words, *goal(3), *end], **{((0, k),): [*words, int(Tag.END_PATH)] for k in range(3)}}
    # Only plain words, so that what is drawn changes nothing in the grammar.
    bias = dict.fromkeys(range(TEXT), -100.0)
    request = ask(
        [TEXT, TEXT + 1], max_tokens=200, frequency_penalty=1.5, presence_penalty=1.0, repetition_penalty=1.3,
        logit_bias=bias,
    )  # fmt: skip
    sampler = FreeWords([script])
    (result,) = toy_engine(MODEL, sampler=sampler).generate([request])
    assert len(result.blocks) == 1
    assert assert_drawn_as_the_reference_draws(request, result, free=sampler.free) == 6 * 6


def test_noise_of_the_reference_is_that_of_the_sampler() -> None:
    for key, index in [(0, 0), (-5, 3), (2**62, 70_000), (-(2**63), 1)]:
        ours = gumbel_noise(torch.tensor([key]), torch.tensor([index]), 50)[0].numpy()
        np.testing.assert_allclose(ours, gumbel(key, index, 50), rtol=1e-12)


def test_structure_tags_are_never_penalised_and_paths_of_one_text_stay_alike() -> None:
    """Many blocks in a row: the tags of the last one are as likely as those of the first."""
    requests = [ask([TEXT], max_tokens=150, repetition_penalty=1.9, frequency_penalty=2.0, presence_penalty=2.0)]
    plain = toy_engine(MODEL, sampler=SoupSampler(3)).generate([ask([TEXT], max_tokens=150)])
    penalised = toy_engine(MODEL, sampler=SoupSampler(3)).generate(requests)
    assert penalised[0].token_ids == plain[0].token_ids
    assert penalised[0].logprobs == plain[0].logprobs


def test_an_answer_does_not_end_before_min_tokens() -> None:
    bias = {EOS: 100.0}
    for min_tokens in (0, 7, 30):
        request = ask([TEXT], max_tokens=60, min_tokens=min_tokens, logit_bias=bias)
        (result,) = toy_engine(MODEL).generate([request])
        assert len(result.token_ids) == min_tokens
        assert result.finish_reason == "stop"
    stop = ask([TEXT], max_tokens=60, min_tokens=9, stop_token_ids=(TEXT + 3,), logit_bias={TEXT + 3: 100.0})
    (result,) = toy_engine(MODEL).generate([stop])
    assert len(result.token_ids) == 9 and TEXT + 3 not in result.token_ids


@pytest.mark.parametrize(
    "bad",
    [
        {"min_p": 1.5},
        {"repetition_penalty": 0.0},
        {"repetition_penalty": float("nan")},
        {"presence_penalty": 2.5},
        {"frequency_penalty": float("inf")},
        {"logit_bias": {3: float("inf")}},
        {"min_tokens": 600},
        {"min_tokens": -1},
        {"logprobs": 21},
    ],
)
def test_values_out_of_range_are_refused(bad: dict[str, object]) -> None:
    with pytest.raises(GenerationError, match=next(iter(bad))):
        SamplingParams(**bad)  # type: ignore[arg-type]


def test_ids_outside_of_the_vocabulary_and_later_changes() -> None:
    with pytest.raises(GenerationError, match="an id of logit_bias is 48, the ids of the vocabulary are 0 to 47"):
        toy_engine(MODEL).add_request(ask([TEXT], logit_bias={VOCAB_SIZE: 1.0}))
    bias = {np.int64(3): 1}
    params = SamplingParams(logit_bias=bias)  # type: ignore[arg-type]
    bias[np.int64(4)] = 5
    assert params.logit_bias == {3: 1.0}
    assert replace(params, seed=4).logit_bias == {3: 1.0}
