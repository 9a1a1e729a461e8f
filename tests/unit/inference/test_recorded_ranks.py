"""Ranks that follow a first one replay the graphs that it replays, step by step: one that captured a graph alone would
wait for the others in the sums of its first call."""

from __future__ import annotations

from collections import deque
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from megatron_multiverse.config import EngineConfig, SamplingParams
from megatron_multiverse.inference import Engine, Request
from megatron_multiverse.inference.step.graph_sizes import Kind
from megatron_multiverse.inference.step.graphs import StepGraphs
from megatron_multiverse.inference.step.model_ranks import PlanChannel
from megatron_multiverse.inference.step.plan import StepPlan
from megatron_multiverse.inference.step.plan_buffer import PlanBuffer
from megatron_multiverse.inference.step.runner import Runner
from megatron_multiverse.kernels.tree_decode import tiles, work
from megatron_multiverse.model.gpt import build_gpt_model

from . import toy
from .recorded import record_steps
from .test_engine import goal
from .test_recorded_steps import SHAPE


class End(PlanChannel):
    """One end of a way within a process."""

    def __init__(self, way: deque[torch.Tensor], *, sends: bool) -> None:
        self._last = None
        self._way, self._sends = way, sends

    def _broadcast(self, tensor: torch.Tensor) -> None:
        if self._sends:
            self._way.append(tensor.clone())
        else:
            tensor.copy_(self._way.popleft())


class Beside(End):
    """A first rank's end: each plan that is sent is received at once, and run by a follower."""

    def __init__(self, follower: Runner) -> None:
        super().__init__(deque(), sends=True)
        self._follower, self._other_end = follower, End(self._way, sends=False)

    def send(self, plan: StepPlan | None) -> None:
        super().send(plan)
        received = self._other_end.receive()
        if received is not None:
            self._follower.launch(received).wait()


def requests(**asked: float) -> list[Request]:
    """A text alone, over keys from where it is worth two items; then several at once, and paths of a block."""
    sampling = SamplingParams(max_tokens=70, branch_max_tokens=40, ignore_eos=True, seed=4, **asked)

    def prompt(length: int, shift: int) -> list[int]:
        return [toy.TEXT + (k + shift) % 9 for k in range(length)]

    several = [Request(prompt_ids=prompt(60 + 3 * k, k), sampling=sampling, sample=k) for k in range(3)]
    block = Request(prompt_ids=prompt(290, 1), sampling=replace(sampling, ignore_eos=False), answer_start=goal(3))
    return [*several, block]


@pytest.mark.parametrize("asked", [{}, {"temperature": 0.8, "top_k": 5}])
def test_ranks_that_follow_replay_the_same_graphs(asked: dict[str, float], monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where each step's plan travels whole, for what it says about the draws."""
    monkeypatch.setattr(work, "AT_ONCE", 0)
    for module in (work, tiles):
        monkeypatch.setattr(module, "LEAST_SHARED", 64)
    kinds: dict[StepGraphs, list[Kind]] = {}
    fills: dict[PlanBuffer, int] = {}
    replay, fill = StepGraphs._replay, PlanBuffer.fill

    def replaying(self: StepGraphs, graph: Any, plan: StepPlan, sampler: Any) -> torch.Tensor:
        kinds.setdefault(self, []).append(graph.kind)
        return replay(self, graph, plan, sampler)

    def filling(self: PlanBuffer, *args: Any) -> None:
        fills[self] = fills.get(self, 0) + 1
        fill(self, *args)

    monkeypatch.setattr(StepGraphs, "_replay", replaying)
    monkeypatch.setattr(PlanBuffer, "fill", filling)
    model = build_gpt_model(SHAPE, dtype=torch.float64, seed=9).eval()
    config = EngineConfig(num_pages=800, page_size=16, max_rows=8, overlap=True)
    first, other = (Engine(model, toy.VOCAB, config, vocab_size=toy.VOCAB_SIZE - 2) for _ in range(2))
    graphs = [record_steps(engine, monkeypatch) for engine in (first, other)]
    first.runner._channel = Beside(other.runner)
    first.generate(requests(**asked)[:1])
    first.generate(requests(**asked))
    assert kinds[graphs[0]] == kinds[graphs[1]]
    assert {kind.slots > 1 for kind in kinds[graphs[0]]} == {True, False}
    brought = [sum(fills[graph.buffer] for graph in each.graphs.values()) for each in graphs]
    assert brought[0] == brought[1] < 0.5 * first.num_steps, "those that follow bring as little over"
    assert torch.equal(*(engine.runner.last_tokens for engine in (first, other)))
    assert np.array_equal(*(engine.runner.store.keys.numpy() for engine in (first, other)))
