"""Scores and comparisons of samples made by hand, against figures worked out plainly; and how parallel texts are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_multiverse.data.tokenizers import build_tokenizer
from megatron_multiverse.errors import ConfigError
from megatron_multiverse.evaluation.compare import compare_runs
from megatron_multiverse.evaluation.parallelism import AnalyzeConfig, analyze, pictures, report_lines
from megatron_multiverse.evaluation.report import score_lines
from megatron_multiverse.evaluation.samples import Sample
from megatron_multiverse.evaluation.scores import Setting, score
from tests.unit.server.running import MODEL


def sample(problem: int, seed: int, correct: bool, **changed: Any) -> Sample:
    fields: dict[str, Any] = {
        "text": "", "finish_reason": "stop", "tokens": 100, "critical_tokens": 50, "decode_steps": 50, "blocks": 1,
        "paths": 2, "malformed": {}, "seconds": 1.0, "task": "t", "problem": str(problem), "thinking": "parallel",
        "budget": None, "seed": seed, "concurrency": 1, "gold": "1", "answer": "1", "correct": correct, "prompt": "",
    }  # fmt: skip
    return Sample(**fields | changed)


def test_scores_are_means_over_problems_with_errors_over_seeds_and_problems() -> None:
    right = np.array([[True, True], [True, False], [False, False]])
    samples = [sample(p, s, bool(right[p, s])) for p in range(3) for s in range(2)]
    found = score([*samples[:5], sample(2, 1, False, tokens=400, blocks=0, malformed={"gap": 2}, answer=None)])
    assert (found.samples, found.problems, found.seeds) == (6, 3, 2)
    assert found.accuracy == pytest.approx(right.mean())
    assert found.stderr_seeds == pytest.approx(right.mean(axis=0).std(ddof=1) / 2**0.5)
    assert found.stderr_problems == pytest.approx(right.mean(axis=1).std(ddof=1) / 3**0.5)
    assert found.any_correct == pytest.approx(2 / 3)
    assert found.num_parallel == pytest.approx(900 / 300) and found.acceleration_ratio == pytest.approx(18 / 6)
    assert found.trigger_ratio == pytest.approx(5 / 6) and found.malformed == pytest.approx(1 / 6)
    (line,) = score_lines({Setting("t", "parallel", None): found})
    assert line.startswith("t, parallel  pass@1 50.0 % ± 16.7 over seeds  # parallel 3.00")
    one = score([sample(p, 0, p > 0) for p in range(3)])
    assert "pass@1 66.7 % ± 33.3 over problems  " in score_lines({Setting("t", "parallel", None): one})[0]
    assert found.no_answer == pytest.approx(1 / 6) and found.malformed_codes == {"gap": 2} and found.closed == 0


def test_an_answer_that_its_budget_ended_is_closed_and_not_malformed() -> None:
    codes = ({"forced_close": 2}, {"fork_refused": 1}, {"forced_close": 1, "stray_tag": 3}, {})
    found = score([sample(k, 0, False, malformed=code) for k, code in enumerate(codes)])
    assert (found.closed, found.malformed) == (0.75, 0.25)
    assert found.malformed_codes == {"forced_close": 3, "fork_refused": 1, "stray_tag": 3}


def test_comparison_pairs_problems_and_its_interval_holds_the_plain_one() -> None:
    rng = np.random.default_rng(0)
    base = rng.random(200) < 0.5
    better = base | (rng.random(200) < 0.3)
    first = [sample(k, 0, bool(one), seconds=2.0, thinking="sequential") for k, one in enumerate(base)]
    second = [sample(k, 0, bool(one)) for k, one in enumerate(better)]
    (found,) = compare_runs(first, [*second, sample(1000, 0, True)])
    differences = better.astype(float) - base
    margin = 1.96 * differences.std(ddof=1) / 200**0.5
    assert found.unpaired == 1 and found.problems == 200 and found.p_value < 0.01
    assert found.difference.value == pytest.approx(differences.mean())
    assert found.difference.low == pytest.approx(differences.mean() - margin, abs=0.01)
    assert found.difference.high == pytest.approx(differences.mean() + margin, abs=0.01)
    assert found.speedup.value == found.speedup.low == pytest.approx(2)
    (same,) = compare_runs(first, first)
    assert same.p_value == 1.0 and same.difference.value == 0


def test_texts_of_outputs_are_measured(tmp_path: Path, whole_figures: list[str]) -> None:
    block = (
        "<Parallel>\n<Goal>\n<Outline>\n1: a\n</Outline>\n<Outline>\n2: b\n</Outline>\n</Goal>\n<Path>\n1: one two"
        " three\n</Path>\n<Path>\n2: four\n</Path>\n<Conclusion>\nc\n</Conclusion>\n</Parallel>"
    )
    rows: list[dict[str, Any]] = [{"prompt": "q", "text": block}, {"prompt": "q", "text": "plain"}, {"index": 3}]
    file = tmp_path / "answers.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = analyze(AnalyzeConfig(input=[str(file)], output=tmp_path / "out"))
    assert (report["texts"], report["with_blocks"], report["malformed_texts"]) == (2, 1, 0)
    assert report["rows_left_out"] == {"missing_key": 1} and report["paths_per_block"]["max"] == 2
    assert report["num_parallel"]["max"] > 1 and report["num_parallel"]["p5"] >= 1
    assert {file.name for file in (tmp_path / "out").iterdir()} == {
        "parallelism.json",
        "parallelism.png",
        "most_parallel.png",
        "views",
    }
    assert whole_figures == ["parallelism", "most_parallel"]
    (page,) = (tmp_path / "out/views").iterdir()
    text = page.read_text()
    assert (
        page.name == "000001.html" and '"title": "Text 1", "question": "q", "original": "one two three\\nfour"' in text
    )
    assert pictures(tmp_path / "out").endswith(
        "/parallelism.png most_parallel.png, pages " + str(page.parent) + "/*.html (1)"
    )
    (tmp_path / "out/views/mine.txt").touch()
    file.write_text(json.dumps(rows[1]) + "\n")
    plain = analyze(AnalyzeConfig(input=[str(file)], output=tmp_path / "out"))
    assert next(report_lines(plain)) == "1 text, 0 with blocks, 0 malformed"
    left = sorted(found.name for found in (tmp_path / "out").rglob("*") if found.is_file())
    assert left == ["mine.txt", "parallelism.json", "parallelism.png"], "none of the earlier texts"
    assert pictures(tmp_path / "out") == f"pictures  {tmp_path}/out/parallelism.png"


def test_records_of_answers_are_measured_as_their_texts(tmp_path: Path) -> None:
    tokenizer = build_tokenizer("HuggingFaceTokenizer", str(MODEL))
    response = (
        "<Think>\n<Parallel>\n<Goal>\n<Outline>\n1: A\n</Outline>\n<Outline>\n2: B\n</Outline>\n</Goal>\n"
        "<Path>\n1: 583\n</Path>\n<Path>\n2: 4\n</Path>\n<Conclusion>\nC\n</Conclusion>\n"
        "</Parallel>\n</Think>\n\nAnswer: C"
    )
    ids = tokenizer.tokenize_response(response)
    texts, records = tmp_path / "texts.jsonl", tmp_path / "rollouts.jsonl"
    texts.write_text(json.dumps({"prompt": "Work out A", "text": response}) + "\n")
    rows = [{"prompt_ids": tokenizer.tokenize("Work out A"), "token_ids": ids}, {"prompt_ids": [1], "token_ids": None},
            {"prompt_ids": [9999], "token_ids": ids}]  # fmt: skip
    records.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = [
        analyze(AnalyzeConfig(input=[str(file)], output=tmp_path / file.stem, tokenizer_model=str(MODEL)))
        for file in (texts, records)
    ]
    refused = [report.pop("rows_left_out") for report in found]
    assert found[0] == found[1] and found[0]["with_blocks"] == 1
    assert refused == [{}, {"missing_key": 1, "other_tokenizer": 1}]
    page = (tmp_path / "rollouts/views/000001.html").read_text()
    assert '"question": "Work out A"' in page
    with pytest.raises(ConfigError, match=r"records of answers, which are token ids: name .*--tokenizer-model"):
        analyze(AnalyzeConfig(input=[str(records)], output=tmp_path / "none"))
