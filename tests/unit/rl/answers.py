"""Answers of a tiny model for the tests of this folder: random trees over the toy vocabulary."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from torch import nn

from megatron_multiverse.config import ModelConfig, SamplingParams
from megatron_multiverse.inference import Request, Result
from tests.unit.inference.toy import (
    VOCAB,
    VOCAB_SIZE,
    Script,
    ScriptedSampler,
    SoupSampler,
    random_prompt,
    random_script,
    toy_engine,
)

CONFIG = ModelConfig(
    num_layers=2, hidden_size=32, ffn_hidden_size=48, num_attention_heads=4, num_query_groups=2, kv_channels=8,
    vocab_size=VOCAB_SIZE + 16, max_sequence_length=4096,
)  # fmt: skip
"""Its last 16 rows are padding, which is never drawn."""


def written(script: Script) -> list[int]:
    """The text that an engine makes of a script, forced tokens included, without a model."""
    from megatron_multiverse.config import EngineConfig
    from megatron_multiverse.inference import Engine
    from tests.unit.inference.toy import NullModel

    engine = Engine(NullModel(), VOCAB, EngineConfig(num_pages=3000, page_size=1), sampler=ScriptedSampler([script]))
    (result,) = engine.generate([Request(prompt_ids=[26], sampling=SamplingParams(max_tokens=2900))])
    return result.token_ids


def answer_group(model: nn.Module, seed: int, *, size: int = 3, soup: bool = False) -> list[Result]:
    """Answers to one random prompt: random trees that end by themselves or, as soup, anyhow."""
    rng = random.Random(seed)
    prompt = random_prompt(rng, 12)
    sampling = SamplingParams(max_tokens=rng.randint(20, 120) if soup else 2000, seed=seed if soup else 0)
    scripts = [random_script(rng, depth=2, blocks=1, most_paths=3, text=5) for _ in range(size)]
    sampler: Any = SoupSampler(seed) if soup else ScriptedSampler(scripts)
    engine = toy_engine(model, sampler=sampler, page_size=16, vocab_size=VOCAB_SIZE)
    results = engine.generate([Request(prompt_ids=prompt, sampling=sampling, sample=k) for k in range(size)])
    engine.close()
    return results


def advantages_of(results: Sequence[Result], seed: int) -> list[float]:
    """Some positive, some negative."""
    rng = random.Random(seed)
    return [rng.choice([-1, 1]) * rng.uniform(0.2, 2) for _ in results]
