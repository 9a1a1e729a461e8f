"""The benchmarks of the engine run, and their block is decoded as their script says."""

from __future__ import annotations

import pytest

from benchmarks import bench_host_step
from megatron_multiverse.inference.bench import BenchConfig, measure


@pytest.mark.parametrize("prepare", [None, bench_host_step.rectangles, bench_host_step.work_list])
def test_the_host_step_is_timed(prepare):
    options = bench_host_step.Options(rows=2, context=20, steps=3)
    assert bench_host_step.measure(options, prepare) > 0


def test_prompts_decode_and_fork_are_timed():
    config = BenchConfig(
        model_preset="tiny",
        dtype="float32",
        parts=("prompt", "decode", "fork"),
        prompts=(20,),
        batch=(2,),
        context=16,
        new_tokens=12,
        fork_prefix=30,
        fork_branches=3,
        fork_tokens=12,
        repeats=1,
    )
    prompt, decode, fork = measure(config)
    assert prompt["case"] == "prompt, 20 tokens" and prompt["ms"] > 0
    assert decode["tokens_per_second"] == pytest.approx(2 / decode["ms_per_step"] * 1e3)
    assert fork["ms_per_step"] > 0 and fork["speedup"] > 0
