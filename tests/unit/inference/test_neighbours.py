"""An answer of a trained model beside others: the same tokens in float32, and in bf16 the same up to rounding."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_multiverse.config import EngineConfig, SamplingParams
from megatron_multiverse.data.tokenizers import build_tokenizer
from megatron_multiverse.inference import Engine, Request, Result, build_engine

MODEL = Path(__file__).parents[3] / "examples" / "quickstart" / "model"
TOKENIZER = build_tokenizer("HuggingFaceTokenizer", str(MODEL))
REQUESTS = [
    Request(
        prompt_ids=TOKENIZER.tokenize(f"Work out A = {500 + k} + {9 * k}; B = ({k} + 76) - (13 * {k}).\n"),
        sampling=SamplingParams(max_tokens=60, seed=5, temperature=6.0),
    )
    for k in range(6)
]
ROUNDING = 0.25
"""Largest difference of a log-probability in bf16, whose 8 bits round logits of 16 to 32 to steps of 0.125."""


def engine(dtype: torch.dtype, **settings: int) -> Engine:
    return build_engine(MODEL, TOKENIZER, EngineConfig(**settings), longest=200, dtype=dtype)


def alone(dtype: torch.dtype) -> list[Result]:
    one = engine(dtype, prefix_cache=False)
    return [one.generate([request])[0] for request in REQUESTS]


@pytest.fixture(scope="module")
def expected() -> list[list[int]]:
    return [result.token_ids for result in alone(torch.float32)]


@pytest.mark.parametrize("settings", [{}, {"max_step_tokens": 32}, {"page_size": 4, "num_pages": 60}])
def test_in_float32_an_answer_does_not_depend_on_its_neighbours(
    settings: dict[str, int], expected: list[list[int]]
) -> None:
    together = engine(torch.float32, **settings).generate(REQUESTS)
    assert [result.token_ids for result in together] == expected
    assert ("num_pages" in settings) == any(result.preemptions for result in together)


def test_in_bf16_it_depends_on_them_by_rounding_alone() -> None:
    pairs = zip(alone(torch.bfloat16), engine(torch.bfloat16, max_step_tokens=32).generate(REQUESTS), strict=True)
    compared = 0
    for one, other in pairs:
        for mine, theirs, a, b in zip(one.token_ids, other.token_ids, one.logprobs, other.logprobs, strict=False):
            if mine != theirs:
                break  # from here on they are different texts
            assert (a is None) == (b is None)
            if a is not None and b is not None:
                assert abs(a - b) < ROUNDING
                compared += 1
    assert compared > 100
