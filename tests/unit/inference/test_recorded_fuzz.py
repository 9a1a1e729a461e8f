"""Whatever is asked, an engine answers by steps as graphs run them what it answers call by call: every setting, prompts
of all lengths that begin alike, requests that come later, step back or are cancelled, and graphs that are dropped."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from megatron_multiverse.config import ModelConfig
from megatron_multiverse.inference import Engine, Request, Result
from megatron_multiverse.inference.step import graph_sizes, graphs
from megatron_multiverse.kernels.tree_decode import prompt, tiles, work
from megatron_multiverse.model.gpt import build_gpt_model
from tests.unit.kernels import listed_keys

from . import toy
from .recorded import record_steps
from .test_engine import goal
from .test_fuzz import random_request, seeds

IDS = toy.VOCAB_SIZE - 2
"""Ids of the tokenizer; the output layer has two more."""


def random_sizes(rng: random.Random, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts, tiles and graphs begin at such sizes as toys have."""
    monkeypatch.setattr(graph_sizes, "MOST_LISTED", rng.choice([0, 0, 2000]))
    monkeypatch.setattr(graph_sizes, "MOST_MIXED", rng.choice([1, 4, 8, 24]))
    monkeypatch.setattr(graph_sizes, "MOST_SEEN", rng.choice([20_000, 1 << 24]))
    monkeypatch.setattr(graph_sizes, "ROWS", rng.choice([(4, 512), (64, 512)]))
    monkeypatch.setattr(graph_sizes, "KEYS", rng.choice([(256, 2048), (8192, 65536)]))
    monkeypatch.setattr(graph_sizes, "PROMPT_SIZES", rng.choice([graph_sizes.PROMPT_SIZES, (12, 24, 64, 128, 512)]))
    monkeypatch.setattr(graphs, "MOST_GRAPHS", rng.choice([2, 5, 256]))
    monkeypatch.setattr(prompt, "LONGEST_LISTED", rng.choice([1, 3, 6, 20]))
    segment = rng.choice([3, 16, 128])
    for module in (prompt, graph_sizes, listed_keys):
        monkeypatch.setattr(module, "SEGMENT", segment)
    least = rng.choice([4, 16, 64])
    for module in (work, tiles):
        monkeypatch.setattr(module, "LEAST_SHARED", least)
    monkeypatch.setattr(work, "AT_ONCE", 0)
    monkeypatch.setattr(tiles, "PLAIN_TIME", rng.choice([0.85, 10.0]))
    for name in ("AHEAD", "AHEAD_OF_FEW"):
        monkeypatch.setattr(tiles, name, rng.choice([4, 16, 48]))


def random_requests(rng: random.Random) -> list[Request]:
    """Some write blocks, whose paths are many rows; half ask for nothing that a graph does not draw."""
    shared = [rng.randrange(toy.TEXT, IDS) for _ in range(260)]
    requests = []
    for k in range(rng.randint(2, 5)):
        request = random_request(rng, 10 * k, max_tokens=rng.randint(1, 150), seed=rng.choice([0, 5]))
        asked = request.sampling
        temperature = rng.choice([0.0, 0.0, 0.8, 1.5])
        settings: dict[str, object] = {
            "temperature": temperature,
            "n": 3 if temperature and rng.random() < 0.2 else 1,
            "commit_after": 0,
            "prompt_logprobs": asked.prompt_logprobs if rng.random() < 0.3 else None,
            "logit_bias": {token: bias for token, bias in asked.logit_bias.items() if token < IDS},
        }
        if rng.random() < 0.5:
            settings |= {"logit_bias": {}, "repetition_penalty": 1.0, "presence_penalty": 0.0, "logprobs": 0}
            settings |= {"frequency_penalty": 0.0}
        start = goal(rng.randint(2, 5)) if asked.max_tokens > 80 else ()
        if start:
            settings |= {"max_critical_tokens": None, "branch_max_tokens": rng.choice([5, 12, 30])}
        own = [rng.randrange(IDS) for _ in range(rng.choice([1, 4, 40, 90]))]
        ids = [*(shared[: rng.choice([10, 70, 150, 260])] if rng.random() < 0.6 else ()), *own]
        sampling = replace(asked, **settings)  # type: ignore[arg-type]
        requests.append(replace(request, prompt_ids=ids, sampling=sampling, answer_start=start, accept=None))
    return requests


def serve(engine: Engine, requests: list[Request], rng: random.Random) -> dict[int, Result]:
    """Their results by id, but for those that are cancelled on the way. `rng` says when what happens."""
    coming = sorted((rng.choice([0, 0, 3, 10, 40]), k) for k in range(len(requests)))
    steps_back = set(rng.sample(range(100), 3))
    cancelled = rng.choice([None, None, 0, 1])
    ids: dict[int, int] = {}
    results: dict[int, Result] = {}
    step = 0
    while coming or engine.has_work:
        while coming and (coming[0][0] <= step or not engine.has_work):
            k = coming.pop(0)[1]
            ids[k] = engine.add_request(requests[k])
        results.update((result.request_id, result) for result in engine.step())
        if engine.scheduler.active and step in steps_back:
            toy.force_preemption(engine)
        if step == 45 and cancelled is not None:  # all have come
            engine.cancel(ids[cancelled])
        step += 1
        assert step < 20_000, "hangs"
    toy.assert_drained(engine)
    if cancelled is not None:
        results.pop(ids[cancelled], None)
    return results


def differences(first: list[float | None] | None, second: list[float | None] | None) -> list[float]:
    pairs = zip(first or (), second or (), strict=True)
    return [abs(x - y) for x, y in pairs if x is not None and y is not None]


@pytest.mark.parametrize("seed", seeds(4))
def test_recorded_steps_answer_what_single_calls_answer(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(5_000_000 + seed)
    shape = ModelConfig(
        num_layers=2,
        hidden_size=32,
        ffn_hidden_size=48,
        num_attention_heads=4,
        num_query_groups=rng.choice([1, 2, 4]),
        kv_channels=8,
        vocab_size=toy.VOCAB_SIZE,
        max_sequence_length=4096,
    )
    model = build_gpt_model(shape, dtype=torch.float64, seed=seed).eval()
    requests, page_size = random_requests(rng), rng.choice([1, 4, 16, 64])
    answers = []
    for recorded in (False, True):
        engine = toy.toy_engine(
            model,
            vocab_size=IDS,
            page_size=page_size,
            num_pages=rng.choice([20_000, 3000]) // page_size,
            max_rows=rng.choice([1, 3, 8, 40]),
            max_step_tokens=rng.choice([1, 30, 100, 200, 4096]),
            prefix_cache=rng.random() < 0.7,
            overlap=rng.random() < 0.7,
            token_latency_target_ms=rng.choice([None, None, None, 3.0]),
            clock=toy.jumping_clock(seed),
        )
        if recorded:
            random_sizes(rng, monkeypatch)
            recorder = record_steps(engine, monkeypatch)
        answers.append(serve(engine, requests, random.Random(seed)))
    assert recorder.replays > 0
    plain, replayed = answers
    assert plain.keys() == replayed.keys()
    for number, first in plain.items():
        second = replayed[number]
        assert first.finish_reason == second.finish_reason
        if first.finish_reason == "error":
            continue  # how far the other paths are by then depends on what runs beside them
        assert first.token_ids == second.token_ids
        assert max(differences(first.logprobs, second.logprobs), default=0) < 1e-8
        assert max(differences(first.prompt_logprobs, second.prompt_logprobs), default=0) < 1e-8
