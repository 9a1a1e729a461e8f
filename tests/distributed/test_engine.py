"""An engine over several ranks gives the answers of one: every token and log-probability, through forks and joins."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_multiverse.checkpoints.load import load_checkpoint
from megatron_multiverse.config import EngineConfig, ModelConfig
from megatron_multiverse.inference.engine import Engine
from megatron_multiverse.inference.step.forward import PagedForward
from megatron_multiverse.inference.step.model_ranks import ModelRanks
from megatron_multiverse.inference.step.plan import StepPlan
from megatron_multiverse.inference.step.runner import Runner
from megatron_multiverse.model.gpt import build_gpt_model
from megatron_multiverse.model.mcore import ensure_process_group, set_parallel_sizes
from megatron_multiverse.model.weights import save_model
from megatron_multiverse.parallel.local_ranks import run_ranks
from tests.unit.inference import toy

from .runs import LIMIT_S

SHAPE: dict[str, Any] = {
    "num_layers": 4, "hidden_size": 32, "ffn_hidden_size": 48, "num_attention_heads": 4, "num_query_groups": 2,
    "kv_channels": 8, "vocab_size": toy.VOCAB_SIZE + 1, "max_sequence_length": 4096, "add_qkv_bias": True,
    "add_bias_linear": False,
}  # fmt: skip
CONFIG = EngineConfig(num_pages=700, page_size=4, max_rows=16, debug=True)
Answers = list[tuple[list[int], list[float | None]]]


@contextmanager
def counted_plans() -> Iterator[list[int]]:
    """Bytes of the plans that travel whole."""
    sent: list[int] = []
    to_bytes = StepPlan.to_bytes

    def counted(plan: StepPlan) -> bytes:
        sent.append(len(to_bytes(plan)))
        return to_bytes(plan)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StepPlan, "to_bytes", counted)
        yield sent


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """Models of an odd vocabulary, with biases that are not zero: with an output layer of its own, and a tied one."""
    folders = {}
    for tied in (False, True):
        config = ModelConfig(**SHAPE, share_embeddings_and_output_weights=tied)
        model = build_gpt_model(config, dtype=torch.float64, seed=5)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for weight in model.parameters():
                weight.add_(torch.randn(weight.shape, generator=generator, dtype=weight.dtype) * 0.1)
        folders[tied] = tmp_path_factory.mktemp("model")
        save_model(model, config, folders[tied])
    return folders


def play(folder: Path, tensor: int, pipeline: int, own_forward: bool) -> tuple[Answers, ...]:
    """On the first rank: answers that fork as scripts say, sampled ones with penalties and prompt scores, and others,
    most of whose steps the other ranks know."""
    torch.set_num_threads(1)
    ensure_process_group()
    set_parallel_sizes(tensor, pipeline)
    if not own_forward:
        PagedForward.runs = staticmethod(lambda model: False)  # type: ignore[method-assign]
    model, _ = load_checkpoint(folder, dtype=torch.float64)
    rng = random.Random(3)
    scripts = [toy.random_script(rng, depth=2, blocks=1, most_paths=2, text=3) for _ in range(2)]
    scripted = [toy.ask(toy.random_prompt(rng), max_tokens=500, sample=k) for k in range(2)]
    drawn = [
        toy.ask([40 + k, 41, 42], max_tokens=8, ignore_eos=True, temperature=0.9, seed=k, **extra)
        for k, extra in enumerate(({}, {"top_k": 5, "repetition_penalty": 1.3, "logprobs": 3}, {"prompt_logprobs": 2}))
    ]
    plain = [toy.ask([30 + k] * k, max_tokens=30 + k, ignore_eos=True, temperature=0.9, seed=k) for k in (2, 6, 10)]
    answers = []
    for requests, sampler in ((scripted, toy.ScriptedSampler(scripts)), (drawn, None), (plain, None)):
        sizes = {"vocab_size": toy.VOCAB_SIZE, "sampler": sampler}
        if not ModelRanks.current().is_first:
            Runner(model, num_pages=0, page_size=0, sampler=sampler).follow()
            continue
        config = replace(CONFIG, overlap=sampler is None)
        engine = Engine(model, toy.VOCAB, config, detokenize=toy.toy_text, **sizes)  # type: ignore[arg-type]
        with counted_plans() as sent:
            results = engine.generate(requests)
        assert requests is not plain or engine.num_steps >= 36 > 2 * len(sent)
        assert sampler is None or all(result.blocks for result in results)
        answers.append([(result.token_ids, result.logprobs) for result in results])
        engine.close()
    return tuple(answers)


@pytest.mark.parametrize(
    ("tensor", "pipeline", "own_forward", "tied"),
    [(2, 1, True, False), (1, 2, True, True), (2, 2, False, True), (4, 1, False, False)],
)
def test_ranks_answer_as_one_does(
    folders: dict[bool, Path], tensor: int, pipeline: int, own_forward: bool, tied: bool
) -> None:
    """With the forward pass of decoding and with the model's own; four ranks share two key/value heads."""
    want = play(folders[tied], 1, 1, True)
    got = run_ranks(play, tensor * pipeline, folders[tied], tensor, pipeline, own_forward, timeout=LIMIT_S)[0]
    for mine, reference in zip(got, want, strict=True):
        assert [ids for ids, _ in mine] == [ids for ids, _ in reference]
        for (_, logprobs), (_, others) in zip(mine, reference, strict=True):
            assert logprobs == pytest.approx(others, abs=1e-9)
