"""The quickstart's decoder and measurements with the model in the repository, on a few problems."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from megatron_multiverse.structure import lay_out, parse

QUICKSTART = Path(__file__).parents[3] / "examples" / "quickstart"
sys.path.insert(0, str(QUICKSTART))

from decode import Decoder  # noqa: E402
from measure import (  # noqa: E402
    answer_one_at_a_time,
    draw_answer,
    fresh_problems,
    measure_answers,
    measure_larger_problems,
    measure_latency,
    measure_logits,
    show_live,
)
from report import print_checks, print_modes  # noqa: E402


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    torch.set_num_threads(1)
    return Decoder(QUICKSTART / "model", num_pages=1024)


def test_few_problems_are_answered_alike_in_every_mode(decoder: Decoder) -> None:
    report = measure_answers(decoder, fresh_problems(4, seed=3))
    assert report["accuracy"] == 1.0 and report["malformed_answers"] == 0
    assert report["parallel_equals_sequential"] is True
    assert report["num_parallel"] > 1.3
    steps = [report[f"decode_steps_per_answer_{mode}"] for mode in ("parallel", "autoregressive", "sequential")]
    assert steps[0] < steps[1] < steps[2]
    assert report["net_speedup_steps"] == pytest.approx(steps[2] / steps[0])


def test_every_decode_step_agrees_with_one_forward_pass(decoder: Decoder) -> None:
    problem = next(p for p in fresh_problems(50, seed=4) if p.depth == 2 and len(p.expressions) == 2)
    report = measure_logits(decoder, [problem])
    result = decoder.answer([problem], "parallel").results[0]
    vocab, prompt = decoder.tokenizer.structure_vocab, decoder.prompt_ids(problem, "parallel")
    forced = lay_out(parse([*prompt, *result.token_ids], vocab, prompt_length=len(prompt))).forced
    assert 0 < report["max_abs_logit_difference"] < 1e-3
    # Sampled are all tokens but the forced ones, and the end of text.
    assert report["logit_rows_compared"] == len(result.token_ids) - (forced[:, 1] - forced[:, 0]).sum() + 1


def test_a_wrong_position_is_noticed(decoder: Decoder) -> None:
    problem = fresh_problems(1, seed=5)[0]
    result = decoder.answer([problem], "parallel").results[0]
    result.position_ids[-1] += 1
    with pytest.raises(RuntimeError, match="disagree"):
        decoder._difference(0, result)


def test_fresh_problems_are_held_out_and_reproducible() -> None:
    problems = fresh_problems(30, seed=1)
    assert problems == fresh_problems(30, seed=1) != fresh_problems(30, seed=2)
    assert all(problem.split == "held_out" and 2 <= len(problem.expressions) <= 4 for problem in problems)
    assert all(problem.depth == 3 for problem in fresh_problems(5, seed=1, max_depth=3))


def test_more_paths_and_deeper_nesting_are_answered(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, answer = [], decoder.answer
    monkeypatch.setattr(decoder, "answer", lambda problems, mode: asked.append(problems) or answer(problems, mode))
    report = measure_larger_problems(decoder, 2, seed=3)
    assert [[len(problem.expressions) for problem in problems] for problems in asked[:2]] == [[6, 6], [8, 8]]
    assert all(problem.depth == 3 and 2 <= len(problem.expressions) <= 3 for problem in asked[2])
    assert all(problem.split == "held_out" for problems in asked for problem in problems)
    kinds = ("6_expressions", "8_expressions", "depth_3")
    assert report == {"larger_problems": 2} | {f"accuracy_{kind}": 1.0 for kind in kinds}


def test_what_is_shown_and_drawn(decoder: Decoder, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    show_live(decoder, seed=0)
    shown = capsys.readouterr().out
    assert "path 1.1" in shown or "path 2.1" in shown or "path 3.1" in shown
    assert "path 6 " in shown
    assert shown.count("-> right") == 2
    problem = fresh_problems(1, seed=6, most=2, max_depth=1)
    alone = answer_one_at_a_time(decoder, problem)
    draw_answer(problem[0], alone[0], tmp_path / "timeline.png")
    assert (tmp_path / "timeline.png").stat().st_size > 10_000
    report = measure_answers(decoder, problem) | measure_latency(alone) | measure_logits(decoder, problem)
    larger = {"accuracy_6_expressions": 0.75, "accuracy_8_expressions": 0.5, "accuracy_depth_3": 1.0}
    report |= {"larger_problems": 8} | larger
    print_modes(report)
    print_checks(report)
    shown = capsys.readouterr().out
    assert "in parallel" in shown
    lines = [line.split() for line in shown.splitlines() if line.startswith("8 problems with")]
    assert [line[-2] for line in lines] == ["75%", "50%", "100%"]


def test_a_step_goes_through_few_files() -> None:
    """What a request does not use stays out of its steps, so that one step can be read in few files."""
    spec = importlib.util.spec_from_file_location(
        "trace_step", QUICKSTART.parents[1] / "tools" / "dev" / "trace_step.py"
    )
    assert spec is not None and spec.loader is not None
    trace_step = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = trace_step  # its dataclasses look themselves up there
    spec.loader.exec_module(trace_step)
    kinds = trace_step.first_of_each_kind(trace_step.trace_steps())
    assert len(kinds["only decodes"].files) <= 12
    assert len(kinds["only decodes"].deepest) <= 7
    for joins in ("writes a join", "joins in the cache"):
        assert len(kinds[joins].files) <= 15, kinds[joins].lines()
