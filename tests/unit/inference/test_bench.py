"""The benchmarks of the engine run, and their block is decoded as their script says."""

from __future__ import annotations

import dataclasses
import json
import re
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from benchmarks import bench_host_blocks, bench_host_step, bench_host_turn, bench_work_list, report_blocks, small_steps
from benchmarks.engine_soak import Soak, SoakConfig
from megatron_multiverse.errors import ConfigError, GenerationError
from megatron_multiverse.inference import bench
from megatron_multiverse.inference.bench import BenchConfig, measure
from megatron_multiverse.inference.bench_blocks import excess, fit_law, work_for
from megatron_multiverse.inference.bench_model import random_prompt
from megatron_multiverse.inference.bench_script import Script
from megatron_multiverse.inference.bench_turns import Turn, TurnWatch
from megatron_multiverse.model.families import preset


@pytest.mark.parametrize("prepare", [None, bench_host_step.rectangles, bench_host_step.work_list])
def test_the_host_step_is_timed(prepare):
    options = bench_host_step.Options(rows=2, context=20, steps=3)
    assert bench_host_step.measure(options, prepare) > 0


def test_the_host_time_of_turns_is_measured():
    options = bench_host_turn.Options(branches=3, prefix=40, path_tokens=12, answers=2, rows=(2, 6))
    times = bench_host_turn.measure_lists(options)
    assert list(times) == [2, 6] and min(times.values()) > 0
    for figures in bench_host_turn.measure(options).values():
        assert list(figures) == ["commit_ms", "plan_ms", "prepare_ms", "turn_ms"] and min(figures.values()) > 0


def test_each_kind_of_step_of_a_block_is_timed(tmp_path):
    options = bench_host_blocks.Options(paths=3, prefix=40, path_tokens=24, answers=2, label="here")
    found = bench_host_blocks.measure(options)
    assert all(0 < row["best_ms"] <= row["median_ms"] for row in found.values())
    once = {"add", "begin", "after begin", "fork", "after fork", "join", "after join", "end"}
    assert {kind for kind, row in found.items() if row["per_answer"] == 1} == once
    # Paths but the last one end before the join; a step after `</Outline>` or before `</Path>` is held.
    assert found["end of a path"]["per_answer"] == found["after end of a path"]["per_answer"] == 2
    assert found["held"]["per_answer"] >= 2 and found["plain"]["per_answer"] > 60 > found["page"]["per_answer"] > 4
    for _ in range(2):
        bench_host_blocks.record(options, found, tmp_path / "found.json")
    runs = json.loads((tmp_path / "found.json").read_text())["runs"]
    assert [run["label"] for run in runs] == ["here", "here"] and runs[0]["kinds"] == found


def test_the_list_of_work_of_steps_that_go_on_is_timed():
    options = bench_work_list.Options(rows=(8,), paths=(1, 3), prefixes=(2048,), own=40, steps=20, seeds=1, repeats=2)
    text, paths = bench_work_list.measure(options)
    assert (text["rows"], text["paths"], paths["rows"], paths["paths"]) == (8, 1, 6, 3)
    for case in (text, paths):
        assert 0 < case["ms"] <= case["longest_ms"] and 0 < case["made_anew"] < 0.5
    # Two requests of three rows read what these share once, rounded up to whole pages.
    assert 2 * 2048 + 6 < paths["keys"] < 2 * 2048 + 6 * (40 + 20 + 2 * 16) and text["keys"] > 8 * 2048
    steps = bench_work_list.successive_steps(options, 2, 3, 2048, 0)
    for (pages, lengths, _), (after, longer, _) in pairwise(steps):
        assert (longer == lengths + 1).all()
        for row, used in enumerate(-(-lengths // 16)):
            assert (after[row, :used] == pages[row, :used]).all()


def test_steps_of_a_small_model_are_timed_with_all_paths_at_once(monkeypatch):
    monkeypatch.setattr(small_steps, "MINIATURE", dataclasses.replace(small_steps.MINIATURE, num_layers=1))
    options = small_steps.Options(cases=("2x0", "1x3"), context=20, new_tokens=12, rounds=1)
    text, block = small_steps.measure(options)
    assert (text["case"], block["case"]) == ("2x0", "1x3")
    for row in (text, block):
        assert 0 < row["host_ms"] <= row["ms_per_step"] and 6 < row["steps_of_all_branches"] < row["steps"]
    with pytest.raises(ConfigError, match="REQUESTSxPATHS"):
        small_steps.Options(cases=("4",))


def test_a_turn_on_a_gpu_says_how_long_that_had_nothing_to_do():
    events = [SimpleNamespace(at=at, elapsed_time=lambda other, at=at: other.at - at) for at in (3.0, 4.5, 7.0, 7.5)]
    figures = Turn("fork", 0.001, 0.002, 0.003, 0.004, 0.005, events=events).figures()
    assert list(figures.values()) == pytest.approx([1, 2, 3, 4, 5, 1.5, 2.5, 0.5])
    assert list(figures)[5:] == ["gpu_idle_ms", "gpu_copy_ms", "gpu_run_ms"]


def test_an_engine_is_as_before_once_nobody_watches_it():
    engine = bench_host_turn.make_engine(bench_host_turn.Options(branches=2, prefix=20, path_tokens=12))
    parts = (engine.runner, engine.runner.graphs, engine.scheduler, *engine.runner._outputs)
    plain = [dict(vars(part)) for part in parts]
    with TurnWatch(engine):
        assert all(vars(part) != before for part, before in zip(parts, plain, strict=True))
    assert [vars(part) for part in parts] == plain


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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch": (16,), "context": 1024, "new_tokens": 9}, r"wrote at once in \d steps, .* try --new-tokens (\d+)"),
        ({"batch": (1,), "context": 16, "new_tokens": 8}, "wrote at once in [78] steps, .* try --new-tokens (17)"),
        ({"parts": ("fork",), "fork_prefix": 30, "fork_branches": 3, "fork_tokens": 4}, "--fork-tokens 4: try (20)"),
    ],
)
def test_a_measurement_of_too_few_steps_says_what_would_be_enough(options, message):
    config = BenchConfig(**{"model_preset": "tiny", "dtype": "float32", "num_layers": 1, "repeats": 1} | options)
    with pytest.raises(ConfigError, match=message) as error:
        list(measure(config))
    enough = int(re.search(message, str(error.value))[1])
    (row,) = measure(dataclasses.replace(config, **{config.parts[0].replace("decode", "new") + "_tokens": enough}))
    assert row["ms_per_step"] > 0


@pytest.mark.parametrize("options", [{"repeats": 0}, {"batch": (8, 0)}, {"num_parallel": (0.5,)}, {"fork_branches": 0}])
def test_nothing_to_measure_is_refused(options):
    with pytest.raises(ConfigError, match=f"{next(iter(options))} must be at least 1, got 0"):
        BenchConfig(**options)


def test_prompts_are_as_long_as_asked_for(monkeypatch):
    given: list[int] = []

    def prompt(length, *rest):
        given.append(length)
        return random_prompt(length, *rest)

    monkeypatch.setattr(bench, "random_prompt", prompt)
    common = {
        "model_preset": "tiny",
        "dtype": "float32",
        "num_layers": 1,
        "batch": (4,),
        "new_tokens": 12,
        "repeats": 1,
    }
    for shortest, lengths in ((None, [40] * 4), (10, [10, 20, 30, 40]), (40, [40] * 4)):
        given.clear()
        assert len(list(measure(BenchConfig(**common, context=40, shortest_context=shortest)))) == 1
        assert sorted(given) == lengths
    for wrong in (0, 41):
        with pytest.raises(ConfigError, match=f"shortest_context must be from 1 to context, 40, got {wrong}"):
            BenchConfig(context=40, shortest_context=wrong)


def test_what_blocks_cost_and_save_is_counted(capsys):
    config = BenchConfig(
        model_preset="tiny",
        dtype="float32",
        parts=("joint", "speedup"),
        batch=(2,),
        context=20,
        fork_prefix=30,
        fork_branches=3,
        fork_tokens=12,
        num_parallel=(1.0, 2.0),
        answer_tokens=60,
        repeats=1,
    )
    joint, in_turn, plain, forked, law = measure(config)
    assert 0 < joint["copied_tokens"] <= joint["most_copied_tokens"] == 11 * 16
    assert in_turn["more_steps"] == 0, "in turn neither fork nor join costs a step"
    assert joint["fed_again_tokens"] == 0
    parts = ["commit_ms", "plan_ms", "copy_ms", "prepare_ms", "launch_ms"]
    for row in (joint, in_turn):
        assert list(row["turns"]) == list(row["excess_ms"]) == ["fork", "join"]
        for figures in row["turns"].values():  # those of a GPU are absent
            assert list(figures) == parts and min(figures.values()) >= 0 and max(figures.values()) > 0
        assert row["fork_and_join_ms"] == pytest.approx(
            sum(map(sum, row["excess_ms"].values())) + row["more_steps"] * row["ms_per_step"]
        )
    one = r"{} commit [\d.]+, plan [\d.]+, copy [\d.]+, prepare [\d.]+, launch [\d.]+"
    assert len(re.findall(f"  ms of {one.format('fork')}; {one.format('join')}\n", capsys.readouterr().out)) == 2
    assert plain["num_parallel"] == plain["speedup"] == 1.0 and plain["tokens"] == pytest.approx(60)
    assert forked["num_parallel"] == pytest.approx(2, rel=0.15) and forked["speedup"] > 0
    assert law["a"] + law["b"] == pytest.approx(plain["ms_per_token"])


def test_the_report_has_every_row(tmp_path, monkeypatch):
    work = {"num_parallel": 1.5, "branches": 3, "seconds": 1.0, "serial_seconds": 1.4, "speedup": 1.4}
    work |= {"tokens": 120, "batch": 8, "case": "speedup", "speedup_per_parallel": 0.93, "ms_per_token": 3.21}
    joint = {"case": "fork", "fork_and_join_ms": 9.5, "runs_ms": [9.4, 9.5], "ms_per_step": 4.7, "in_steps": 2.02}
    joint |= {"overlap": True, "more_steps": 2, "copied_tokens": 99, "most_copied_tokens": 416, "fed_again_tokens": 0}
    joint |= {"branches": 8, "path_tokens": 128, "prefix": 16384}
    law = {"case": "law, batch 8", "batch": 8, "a": 4.0, "b": 0.5}
    names = ("gpu", "model", "context", "tokens", "torch", "triton")
    runs = {"abc1234": {"date": "2026-01-01", "command": ["bench one", "bench two"]}}
    rows = [joint | {"commit": "abc1234"}, work | {"commit": "abc1234"}, law]
    source = tmp_path / "blocks.json"
    environment = dict.fromkeys(names, "x") | {"model": "tiny", "context": "1,024"}
    source.write_text(json.dumps({"environment": environment, "runs": runs, "rows": rows}))
    monkeypatch.setattr("sys.argv", ["report_blocks", str(source)])
    report_blocks.main()
    text = source.with_suffix(".md").read_text()
    assert re.search(
        r"\| 8 \| 1\.50 \| 3 \| 1\.000 \| 1\.400 \| 1\.40 \| 0\.930 \|  \| 0\.\d{3} \| 3\.21 \| abc1234 \|", text
    )
    assert "- abc1234, 2026-01-01: `bench one`, `bench two`" in text
    assert (
        "9.5 [9.4, 9.5] | 2.02 | 2 | 99 (416) | 0 | abc1234 |" in text and "batch 8: 4.00 / num_parallel + 0.50" in text
    )
    assert source.with_suffix(".png").stat().st_size > 10_000


def test_only_keys_keep_an_ideal_engine_from_the_whole_speedup():
    row = {"batch": 8, "branches": 4, "tokens": 430, "num_parallel": 430 / 130}  # paths of 100 tokens, 30 after them
    shape = preset("qwen2.5-7b")
    heavy = dataclasses.replace(shape, ffn_hidden_size=10**9)  # keys are nothing beside such weights
    assert report_blocks.ideal_speedup(row, heavy, 1024) == pytest.approx(row["num_parallel"], rel=1e-3)
    alone, together = (report_blocks.ideal_speedup(row | {"batch": batch}, shape, 1024) for batch in (1, 256))
    assert together < alone < row["num_parallel"]
    assert report_blocks.ideal_speedup(row | {"branches": 0}, shape, 1024) == 1.0


def test_what_step_times_leave_of_a_speedup() -> None:
    """Where rows cost nothing, all; where a row costs what it would alone, nothing; on straight lines between."""
    row = {"batch": 8, "branches": 3, "tokens": 536, "num_parallel": 536 / 270}
    assert report_blocks.speedup_by_steps(row, {1: 4.0, 8: 4.0, 32: 4.0}) == pytest.approx(536 / 270)
    assert report_blocks.speedup_by_steps(row, {1: 1.0, 8: 8.0, 16: 16.0}) == pytest.approx(1)
    between = report_blocks.speedup_by_steps(row, {8: 4.0, 40: 6.0})  # 24 rows take 5.0
    assert between == pytest.approx(536 * 4 / (133 * 5 + 137 * 4))
    assert report_blocks.speedup_by_steps(row | {"branches": 0}, {1: 4.0, 8: 4.0}) == 1.0


@pytest.mark.parametrize("num_parallel", [1.2, 1.5, 2.0, 4.0])
def test_the_work_has_the_parallelism_asked_for(num_parallel):
    work = work_for(num_parallel, 600)
    tokens = work.branches * work.path_tokens + work.text_tokens
    assert tokens == pytest.approx(600, abs=2)
    assert tokens / (work.path_tokens + work.text_tokens) == pytest.approx(num_parallel, rel=0.02)


def test_the_law_and_the_excess_are_found_again():
    rows = [{"num_parallel": x, "ms_per_token": 15.43 / x + 0.6} for x in (1, 1.5, 4)]
    assert fit_law(rows) == pytest.approx((15.43, 0.6))
    inside = [False] * 40 + [True] * 40 + [False] * 40
    times = [2.0 if x else 1.0 for x in inside]
    assert not np.any(excess(times, inside))
    times[41] += 3.0
    times[80] += 0.5
    times[60] += 9.0  # far from both
    fork, join = excess(times, inside)
    assert fork == pytest.approx([0] * 7 + [3.0] + [0] * 4) and join == pytest.approx([0] * 6 + [0.5] + [0] * 5)


def test_a_step_that_reads_part_of_a_prompt_asks_a_script_for_nothing():
    nothing = SimpleNamespace(keys=np.zeros(0, dtype=np.int64), indices=np.zeros(0, dtype=np.int64))
    tokens, logprobs = Script({})(torch.zeros(0, 9), nothing)
    assert len(tokens) == len(logprobs) == 0 and tokens.dtype == torch.int64


def test_the_soak_checks_every_answer():
    config = SoakConfig(seconds=2, batch=8, rows=12, model_preset="tiny", cache=0.2, cancelled=0.2)
    soak = Soak(config)
    report = soak.run()
    assert report["answers"] >= 8 and report["forks"] > 0 and report["missing_pages"] == 0
    assert report["logprob_off"] < 1e-4

    soak = Soak(config)
    original = soak.check
    soak.check = lambda result: original(_with_another_token(result))  # type: ignore[method-assign]
    with pytest.raises(GenerationError, match="a wrong token"):
        soak.run()


def _with_another_token(result):
    """One drawn word exchanged for another."""
    index = max(k for k, (token, drawn) in enumerate(zip(result.token_ids, result.sampled, strict=True)) if drawn)
    result.token_ids[index] = 100 + (result.token_ids[index] + 1) % 300
    return result
