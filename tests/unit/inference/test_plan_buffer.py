"""The integers of a step as a CUDA graph reads them: what is left standing from earlier steps is what belongs there."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.bench_host_step import NoModel
from benchmarks.bench_host_turn import VOCAB_SIZE, HostGraphs
from megatron_multiverse.config import EngineConfig, SamplingParams
from megatron_multiverse.inference import Engine, Request
from megatron_multiverse.inference.bench_script import TEXT, VOCAB, Script, block_script
from megatron_multiverse.inference.step.graph_sizes import Fit
from megatron_multiverse.inference.step.plan import StepPlan
from megatron_multiverse.inference.step.plan_buffer import PlanBuffer


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("filters", [{}, {"temperature": 0.8, "top_k": 5, "min_p": 0.1}])
def test_a_buffer_holds_what_an_unused_one_would(
    overlap: bool, filters: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over text, forks, paths of other lengths and joins, of one request and of several that come later."""
    fill, sizes = PlanBuffer.fill, []

    def compared(self: PlanBuffer, plan: StepPlan, fit: Fit) -> None:
        fill(self, plan, fit)
        work = fit.work
        unused = PlanBuffer(fit.kind, torch.device("cpu"))
        fill(unused, plan, fit)
        for name, array in unused.device.items():
            count = work.pages.size if name == "pages" else len(array)  # pages behind those of the list are never read
            assert torch.equal(array[:count], self.device[name][:count]), name
        expected = np.zeros_like(unused.device["limits"].numpy())
        expected[: len(work.limits)] = work.limits
        assert np.array_equal(self.device["limits"].numpy(), expected)
        sizes.append(len(plan.ids))

    monkeypatch.setattr(PlanBuffer, "fill", compared)
    config = EngineConfig(num_pages=400, page_size=16, max_rows=16, overlap=overlap)
    engine = Engine(NoModel(VOCAB_SIZE), VOCAB, config, sampler=Script(block_script(3, 40)))
    engine.runner.graphs = HostGraphs(16)  # type: ignore[assignment]
    block = SamplingParams(max_tokens=600, **filters)
    engine.generate([Request(prompt_ids=[TEXT] * 70, sampling=block)])
    engine.generate([Request(prompt_ids=[TEXT] * 33, sampling=block), Request(prompt_ids=[TEXT] * 90, sampling=block)])
    assert len(sizes) > 200 and len(set(sizes)) > 4
    texts = Engine(NoModel(VOCAB_SIZE), VOCAB, config)
    texts.runner.graphs = HostGraphs(16)  # type: ignore[assignment]
    ends = [SamplingParams(max_tokens=length, ignore_eos=True, **filters) for length in range(4, 40, 5)]
    # Fewer rows, step by step.
    texts.generate([Request(prompt_ids=[TEXT] * 20, sampling=sampling) for sampling in ends])
    assert set(range(1, 9)) <= set(sizes)
