"""What a server's engine does before anybody asks: all that would be compiled later."""

from __future__ import annotations

import pytest
import torch

from megatron_multiverse.config import EngineConfig
from megatron_multiverse.inference import Engine
from megatron_multiverse.inference.first_requests import warm_up
from megatron_multiverse.inference.step import graph_sizes
from megatron_multiverse.inference.step.runner import Runner
from megatron_multiverse.kernels.tree_decode import prompt_rows
from megatron_multiverse.model.gpt import build_gpt_model

from . import toy
from .recorded import record_steps
from .test_recorded_steps import SHAPE


@pytest.mark.usefixtures("overlap")
def test_a_block_is_written_while_a_long_prompt_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where the prompt is so long that its last chunks are read call by call."""
    monkeypatch.setattr(Runner, "long_prompt", lambda self, chunk: 700)
    monkeypatch.setattr(graph_sizes, "MOST_LISTED", 0)
    model = build_gpt_model(SHAPE, dtype=torch.float64, seed=0).eval()
    engine = toy.toy_engine(model, page_size=16, num_pages=400, max_step_tokens=200, max_position=10**9)
    graphs = record_steps(engine, monkeypatch)
    plans = []
    launch = engine.runner.launch

    def launched(plan, replay=None):
        plans.append(plan)
        return launch(plan, replay)

    monkeypatch.setattr(engine.runner, "launch", launched)
    warm_up(engine)
    assert not engine.has_work
    toy.assert_drained(engine)
    with_prompts = [plan for plan in plans if prompt_rows(plan.borders).any()]
    assert any(prompt_rows(plan.borders).all() for plan in with_prompts)
    assert any(len(plan.lengths) >= 4 for plan in with_prompts), "the paths are written meanwhile"
    assert {kind.keys > 0 for kind in graphs.graphs} == {True, False}


def test_what_an_engine_cannot_serve_is_left_out() -> None:
    for config in (EngineConfig(num_pages=2, page_size=4), EngineConfig(num_pages=400, max_depth=0)):
        engine = Engine(toy.ToyModel(), toy.VOCAB, config)
        warm_up(engine)
        assert not engine.has_work and engine.num_steps > 0


def test_small_chunks_do_not_keep_a_server_from_starting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Runner, "long_prompt", lambda self, chunk: 16_384)
    engine = toy.toy_engine(toy.NullModel(), page_size=16, num_pages=4000, max_step_tokens=4, max_position=10**9)
    warm_up(engine)
    assert 64 <= engine.num_steps < 500


def test_the_last_chunk_of_the_long_prompt_is_no_graphs() -> None:
    """Its tokens see more keys than those of any graph's prompts."""

    class OnGPU:
        class store:
            class keys:
                is_cuda = True

    for chunk in (512, 2048, 8192):
        length = Runner.long_prompt(OnGPU(), chunk)  # type: ignore[arg-type]
        assert length % chunk == 0 and chunk * length > graph_sizes.MOST_SEEN
