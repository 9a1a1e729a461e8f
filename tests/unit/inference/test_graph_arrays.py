"""What a CUDA graph reads in each step, whatever was asked before: nothing that was handed on is stale."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.bench_host_turn import HostGraphs
from megatron_multiverse.inference import Request
from megatron_multiverse.inference.step import graph_sizes
from megatron_multiverse.inference.step.graph_sizes import Fit
from megatron_multiverse.inference.step.plan import Shaping, StepPlan
from megatron_multiverse.inference.step.plan_buffer import PlanBuffer
from megatron_multiverse.kernels.tree_decode import Work, prompt, tiles, work
from tests.unit.kernels.listed_keys import check_reads

from .test_fuzz import random_engine, random_request, seeds
from .toy import VOCAB_SIZE, NullModel, SoupSampler, assert_drained, changed, force_preemption, random_prompt

pytestmark = pytest.mark.usefixtures("overlap")


class Compared:
    """Stands in for `PlanBuffer.fill`, and compares each step with what an unused buffer holds."""

    def __init__(self) -> None:
        self.fill = PlanBuffer.fill
        self.sharers: set[int] = set()
        self.parts: set[int] = set()
        self.moved = self.with_prompts = 0
        self._last: Work | None = None
        self._frozen: list[tuple[np.ndarray, np.ndarray]] = []
        """Arrays of the steps before, which may still wait for the GPU, and what stood in them."""

    def check(self, buffer: PlanBuffer, plan: StepPlan, fit: Fit, page_size: int) -> None:
        """Fill `buffer`, and look at what it has."""
        work, segments = fit.work, fit.segments
        check_reads(work, plan.pages, plan.lengths, plan.borders, page_size, segments)
        self.with_prompts += segments is not None
        self.sharers.add(work.tokens.shape[1])
        self.parts.add(int(work.counts.max(initial=0)))
        self.moved += self._last is not None and work.tokens is self._last.tokens
        self._last = work
        self.fill(buffer, plan, fit)
        unused = PlanBuffer(fit.kind, torch.device("cpu"))
        self.fill(unused, plan, fit)
        for name, array in unused.device.items():
            count = work.pages.size if name == "pages" else len(array)  # pages behind those of the list are never read
            assert torch.equal(array[:count], buffer.device[name][:count]), name
        for array, before in self._frozen:
            assert np.array_equal(array, before), "an array was changed after it was handed on"
        arrays = [*vars(plan).values(), *vars(plan.sampling).values(), *work, *(segments or ())]
        if isinstance(plan.sampling.shaping, Shaping):
            arrays += vars(plan.sampling.shaping).values()
        self._frozen = self._frozen[-200:] + [(x, x.copy()) for x in arrays if isinstance(x, np.ndarray)]


def share_short_prefixes(monkeypatch: pytest.MonkeyPatch, rng: random.Random) -> None:
    """Rows share what toys have in common, in tiles of any width, and short rows are cut."""
    for module in (work, tiles):
        monkeypatch.setattr(module, "LEAST_SHARED", rng.choice([1, 32, 256]))
    monkeypatch.setattr(work, "AT_ONCE", 0)
    monkeypatch.setattr(tiles, "PLAIN_TIME", float("inf"))
    monkeypatch.setattr(tiles, "TIMES", rng.choice([(1, 9, 9), (9, 1, 9), (9, 9, 1)]))
    monkeypatch.setattr(tiles, "HUGE", rng.choice([64, 8192]))


def play(seed: int, monkeypatch: pytest.MonkeyPatch) -> Compared:
    """Tag soup after prompts that begin alike, under every setting, with steps back and a request that is cancelled."""
    rng = random.Random(3_000_000 + seed)
    share_short_prefixes(monkeypatch, rng)
    if rng.random() < 0.5:  # prompts are short
        monkeypatch.setattr(graph_sizes, "MOST_LISTED", 0)
        monkeypatch.setattr(graph_sizes, "MOST_MIXED", 4)
        monkeypatch.setattr(prompt, "LONGEST_LISTED", 6)
    begin = random_prompt(rng, 1) * rng.choice([0, 70, 400])
    requests: list[Request] = []
    for k in range(4):
        request = random_request(rng, 10 * k, max_tokens=rng.randint(1, 160))
        if request.sampling.temperature and rng.random() < 0.5:
            request = changed(request, n=3)
        requests.append(replace(request, prompt_ids=[*begin, *request.prompt_ids]))
    engine = random_engine(rng, model=NullModel(), sampler=SoupSampler(seed), vocab_size=VOCAB_SIZE)
    page_size = engine.config.page_size
    engine.runner.graphs = HostGraphs(page_size)  # type: ignore[assignment]
    compared = Compared()

    def fill(self: PlanBuffer, plan: StepPlan, fit: Fit) -> None:
        compared.check(self, plan, fit, page_size)

    monkeypatch.setattr(PlanBuffer, "fill", fill)
    late = requests.pop()
    first = [engine.add_request(request) for request in requests]
    done, step, preempt_at = 0, 0, set(rng.sample(range(120), 3))
    while engine.has_work:
        done += len(engine.step())
        step += 1
        if step in preempt_at and engine.scheduler.active:
            force_preemption(engine)
        if step == 15:
            engine.add_request(late)
        if step == 25:
            engine.cancel(first[0])
        assert step < 20_000, "hangs"
    assert done >= sum(request.sampling.n for request in requests)
    assert_drained(engine)
    return compared


@pytest.mark.parametrize("seed", seeds(6))
def test_a_graph_reads_what_belongs_to_its_step(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    play(seed, monkeypatch)


def test_these_steps_share_keys_are_cut_and_go_on() -> None:
    found: list[Any] = []
    for seed in range(8):
        with pytest.MonkeyPatch.context() as patch:
            found.append(play(seed, patch))
    assert len(set().union(*(one.sharers for one in found))) >= 3
    assert max(max(one.parts, default=0) for one in found) > 1 and sum(one.moved for one in found) > 100
    assert sum(one.with_prompts for one in found) > 5
