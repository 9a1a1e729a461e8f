"""Steps as CUDA graphs run them, without a GPU: padded, over arrays that keep their place, with prompts among them."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from megatron_multiverse.config import EngineConfig, ModelConfig, SamplingParams
from megatron_multiverse.inference import Engine, Request
from megatron_multiverse.inference.step import graph_sizes
from megatron_multiverse.inference.step import graphs as graphs_module
from megatron_multiverse.inference.step.graph_sizes import Fit, Kind
from megatron_multiverse.inference.step.graphs import StepGraphs
from megatron_multiverse.inference.step.plan import StepPlan
from megatron_multiverse.inference.step.plan_buffer import PlanBuffer
from megatron_multiverse.kernels.tree_decode import Work, prompt, tiles, work
from megatron_multiverse.model.gpt import build_gpt_model
from tests.unit.kernels.listed_keys import check_reads

from . import toy
from .recorded import record_steps
from .test_engine import goal

SHAPE = ModelConfig(
    num_layers=2,
    hidden_size=32,
    ffn_hidden_size=48,
    num_attention_heads=4,
    num_query_groups=2,
    kv_channels=8,
    vocab_size=toy.VOCAB_SIZE,
    max_sequence_length=4096,
)


def short_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts of more than six tokens are read apart from the other rows, which share tiles however short they are."""
    monkeypatch.setattr(graph_sizes, "MOST_LISTED", 0)
    monkeypatch.setattr(graph_sizes, "MOST_MIXED", 8)
    monkeypatch.setattr(prompt, "LONGEST_LISTED", 6)
    monkeypatch.setattr(work, "AT_ONCE", 0)


@pytest.mark.usefixtures("overlap")
@pytest.mark.parametrize("seed", range(2))
def test_random_trees_by_recorded_steps_equal_one_forward(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forks, joins and nested blocks beside prompts that come in chunks: every logit, in float64."""
    short_prompts(monkeypatch)
    model = build_gpt_model(SHAPE, dtype=torch.float64, seed=seed).eval()
    scripts, requests = [], []
    for k in range(5):
        rng = random.Random(100 * seed + k)
        depth, blocks, most_paths = rng.choice([(1, 2, 5), (2, 1, 3), (2, 2, 2)])
        script = toy.random_script(rng, depth=depth, blocks=blocks, most_paths=most_paths, text=6)
        scripts.append(toy.tags_on_own_lines(script))
        ids = [rng.randrange(toy.TEXT, toy.VOCAB_SIZE) for _ in range(rng.choice([3, 30, 90, 200]))]
        requests.append(toy.ask(ids, max_tokens=2000, sample=k))
    sampler = toy.ScriptedSampler(scripts)
    engine = toy.toy_engine(
        model, page_size=4, num_pages=4000, sampler=sampler, max_position=10**9, max_step_tokens=70, max_rows=24
    )
    graphs = record_steps(engine, monkeypatch)
    results = engine.generate(requests)
    assert graphs.replays >= engine.num_steps > 40  # the last step may be one too many
    assert {kind.keys > 0 for kind in graphs.graphs} == {True, False}
    assert toy.largest_difference(model, sampler, requests, results) < 1e-9
    toy.assert_drained(engine)


def requests_with(**asked: float) -> list[Request]:
    """Six prompts of other lengths; all but every third request ask for that."""
    return [
        Request(
            prompt_ids=[toy.TEXT + (7 * k + i) % (toy.VOCAB_SIZE - 2 - toy.TEXT) for i in range(5 + 20 * k)],
            sampling=SamplingParams(max_tokens=20 + 5 * k, ignore_eos=True, seed=k, **asked if k % 3 else {}),
        )
        for k in range(6)
    ]


def come_one_by_one(engine: Engine, requests: list[Request]) -> list[tuple[int, list[int]]]:
    """The answers to requests that come while others are served, by their ids."""
    results = []
    for request in requests:
        engine.add_request(request)
        results += engine.step() + engine.step()
    while engine.has_work:
        results += engine.step()
    return sorted((result.request_id, result.token_ids) for result in results)


def engines(monkeypatch: pytest.MonkeyPatch) -> tuple[Engine, Engine, StepGraphs]:
    """Two over one model: one that runs its steps call by call and in turn, one that has graphs, and these."""
    model = build_gpt_model(SHAPE, dtype=torch.float64, seed=9).eval()
    plain, recorded = (
        Engine(
            model,
            toy.VOCAB,
            EngineConfig(num_pages=800, page_size=4, max_step_tokens=50, max_rows=8, overlap=overlap),
            vocab_size=toy.VOCAB_SIZE - 2,
        )
        for overlap in (False, True)
    )
    return plain, recorded, record_steps(recorded, monkeypatch)


@pytest.mark.parametrize(
    "asked", [{}, {"temperature": 0.9}, {"temperature": 1.5, "top_k": 9, "min_p": 0.05}, {"repetition_penalty": 1.3}]
)
def test_recorded_steps_draw_what_single_calls_draw(asked: dict[str, float], monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests that come one after the other, so that sizes change while tokens are still to come; some draw without
    noise, and those with penalties outside of the graph."""
    short_prompts(monkeypatch)
    plain, recorded, graphs = engines(monkeypatch)
    requests = requests_with(**asked)
    assert come_one_by_one(plain, requests) == come_one_by_one(recorded, requests)
    assert graphs.replays >= recorded.num_steps and len(graphs.graphs) > 4


def test_graphs_read_what_steps_draw_that_run_call_by_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps that score prompts, between others, while what all others draw is still to come."""
    short_prompts(monkeypatch)
    plain, recorded, graphs = engines(monkeypatch)
    requests = requests_with(prompt_logprobs=2)
    assert come_one_by_one(plain, requests) == come_one_by_one(recorded, requests)
    assert 4 <= recorded.num_steps - graphs.replays < graphs.replays


def test_few_graphs_are_kept_and_their_logits_stand_in_one_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many kinds of steps a server sees, its memory is enough."""
    short_prompts(monkeypatch)
    monkeypatch.setattr(graphs_module, "MOST_GRAPHS", 4)
    plain, recorded, graphs = engines(monkeypatch)
    captured: list[Kind] = []
    capture = graphs._capture
    monkeypatch.setattr(graphs, "_capture", lambda kind: captured.append(kind) or capture(kind))
    for asked in ({"repetition_penalty": 1.3}, {}, {"repetition_penalty": 1.3}):
        requests = requests_with(**asked)
        assert come_one_by_one(plain, requests) == come_one_by_one(recorded, requests)
        assert len(graphs.graphs) == 4 and max(graph.last_use for graph in graphs.graphs.values()) == graphs.replays
    assert len(captured) > len(set(captured)) > 8
    own = [graph.result.data_ptr() for kind, graph in graphs.graphs.items() if kind.draw == "logits"]
    assert len(own) > 1 and len(set(own)) == 1


@pytest.mark.parametrize("page_size", [4, 16])
@pytest.mark.parametrize("asked", [{}, {"temperature": 0.8, "top_k": 5}, {"repetition_penalty": 1.3}])
def test_a_graph_makes_its_step_the_next_one_while_rows_stay_in_their_pages(
    asked: dict[str, float], page_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it reads then is what the host would have brought, for text, for paths, and from one to the other."""
    monkeypatch.setattr(work, "AT_ONCE", 0)
    for module in (work, tiles):
        monkeypatch.setattr(module, "LEAST_SHARED", 16)
    moved: set[int] = set()
    filled: list[StepPlan] = []
    fill, replay = PlanBuffer.fill, StepGraphs._replay

    def filling(self: PlanBuffer, plan: StepPlan, fit: Fit) -> None:
        filled.append(plan)
        fill(self, plan, fit)

    def replaying(self: StepGraphs, graph: Any, plan: StepPlan, sampler: Any) -> torch.Tensor:
        if plan not in filled:
            rows, there = len(plan.ids), {name: x.numpy() for name, x in graph.buffer.device.items()}
            moved.add(rows)
            for name in ("sources", "positions", "write_slots", "write_tokens", "logit_tokens"):
                wanted = plan.borders[1:] - 1 if name == "logit_tokens" else getattr(plan, name)
                assert np.array_equal(there[name][:rows], wanted), name
            assert (there["write_slots"][rows:] == -1).all()
            assert np.array_equal(there["indices"][:rows], plan.sampling.indices)
            names = ("items", "tokens", "limits", "tails", "counts", "pages")
            listed = Work(*(there[name] for name in names), slots=graph.kind.slots)
            used = listed.items[:, 2] > 0  # the others are padding
            parts = {name: getattr(listed, name)[used] for name in ("items", "tokens", "limits")}
            tails = listed.tails[used] if len(listed.tails) else listed.tails
            listed = listed._replace(**parts, tails=tails, counts=listed.counts[:rows])
            check_reads(listed, plan.pages, plan.lengths, plan.borders, page_size)
        return replay(self, graph, plan, sampler)

    monkeypatch.setattr(PlanBuffer, "fill", filling)
    monkeypatch.setattr(StepGraphs, "_replay", replaying)
    model = build_gpt_model(SHAPE, dtype=torch.float64, seed=9).eval()
    config = EngineConfig(num_pages=800, page_size=page_size, max_rows=8, overlap=True)
    engine = Engine(model, toy.VOCAB, config, vocab_size=toy.VOCAB_SIZE - 2)
    record_steps(engine, monkeypatch)
    sampling = SamplingParams(max_tokens=400, branch_max_tokens=40, seed=3, **asked)
    ids = [toy.TEXT + k % 5 for k in range(30)]
    engine.generate([Request(prompt_ids=ids, sampling=sampling, answer_start=goal(3))])
    engine.generate(requests_with(**asked))
    assert moved >= {1, 3}
    assert len(filled) < 0.7 * engine.num_steps or page_size == 4


def test_a_step_that_was_prepared_and_withdrawn_is_not_moved_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its integers stand where those of the step that ran have been moved on."""
    _, engine, graphs = engines(monkeypatch)
    plans: list[StepPlan] = []
    replay = StepGraphs._replay

    def replaying(self: StepGraphs, graph: Any, plan: StepPlan, sampler: Any) -> torch.Tensor:
        plans.append(plan)
        return replay(self, graph, plan, sampler)

    with monkeypatch.context() as patch:
        patch.setattr(StepGraphs, "_replay", replaying)
        engine.generate(requests_with()[:1])
    number = next(k for k, plan in enumerate(plans) if k > 4 and plan.moved_from is not None)
    other, ran, following = plans[number - 2 : number + 1]
    assert ran.lengths is following.moved_from
    runner, captured = engine.runner, len(graphs.graphs)
    for withdrawn in (None, replace(other, moved_from=None)):
        runner.launch(replace(ran, moved_from=None)).wait()
        if withdrawn is not None:
            runner.prepare(withdrawn)
        runner.prepare(following)
        graph = max(graphs.graphs.values(), key=lambda graph: graph.last_use)
        assert graph.buffer.device["positions"].tolist() == following.positions.tolist()
    assert len(graphs.graphs) == captured
