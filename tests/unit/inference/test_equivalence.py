"""Decoding over the page tree equals one forward over the whole answer."""

from __future__ import annotations

import random

import pytest
import torch

from megatron_multiverse.config import ModelConfig
from megatron_multiverse.kernels.tree_decode import reference
from megatron_multiverse.model.gpt import build_gpt_model

from .toy import (
    VOCAB_SIZE,
    ScriptedSampler,
    ToyModel,
    ask,
    assert_drained,
    largest_difference,
    random_prompt,
    random_script,
    structure_positions,
    toy_engine,
)

pytestmark = pytest.mark.usefixtures("overlap")


def play(model, seeds, *, page_size, **settings):
    """Serve one random tree per seed together; returns (difference, results, engine)."""
    scripts, requests = [], []
    for k, seed in enumerate(seeds):
        rng = random.Random(seed)
        depth, blocks, most_paths = rng.choice([(1, 2, 5), (1, 1, 9), (2, 1, 3), (2, 2, 2), (3, 1, 2)])
        scripts.append(random_script(rng, depth=depth, blocks=blocks, most_paths=most_paths, text=8))
        requests.append(ask(random_prompt(rng), max_tokens=3000, sample=k))
    sampler = ScriptedSampler(scripts)
    settings.setdefault("num_pages", 24_000 // page_size)
    engine = toy_engine(model, page_size=page_size, sampler=sampler, max_position=10**9, **settings)
    results = engine.generate(requests)
    difference = largest_difference(model, sampler, requests, results)
    for request, result in zip(requests, results, strict=True):
        assert result.finish_reason == "stop"
        assert not result.malformed
        assert result.position_ids == structure_positions(request.prompt_ids, result)
    assert_drained(engine)
    engine.runner.close()
    return difference, results, engine


@pytest.mark.parametrize("page_size", [1, 16, 64])
@pytest.mark.parametrize("group", range(5))
def test_logits_equal_one_forward_on_the_toy_model(page_size, group, monkeypatch):
    rng = random.Random(1000 + group)
    monkeypatch.setattr(reference, "MOST_PADDING", rng.choice([0, 512]))
    seeds = range(1000 * page_size + 100 * group, 1000 * page_size + 100 * group + 5)
    difference, results, _ = play(
        ToyModel(group),
        seeds,
        page_size=page_size,
        max_rows=rng.choice([2, 5, 64]),
        max_step_tokens=rng.choice([1, 7, 4096]),
    )
    assert difference < 1e-9
    assert any(result.blocks for result in results)


@pytest.fixture(scope="module")
def gpt():
    config = ModelConfig(
        num_layers=2,
        hidden_size=32,
        ffn_hidden_size=48,
        num_attention_heads=4,
        num_query_groups=2,
        kv_channels=8,
        vocab_size=VOCAB_SIZE,
        max_sequence_length=4096,
        add_qkv_bias=True,
    )
    return build_gpt_model(config, dtype=torch.float64).eval()


@pytest.mark.parametrize("page_size", [1, 16, 64])
@pytest.mark.parametrize("group", range(2))
def test_logits_equal_one_forward_on_megatron_core(gpt, page_size, group):
    rng = random.Random(group)
    difference, _, engine = play(
        gpt,
        range(70_000 + 1000 * page_size + 10 * group, 70_004 + 1000 * page_size + 10 * group),
        page_size=page_size,
        max_rows=rng.choice([3, 40]),
        max_step_tokens=rng.choice([5, 4096]),
    )
    assert difference < 1e-9
    assert engine.num_steps > 0
