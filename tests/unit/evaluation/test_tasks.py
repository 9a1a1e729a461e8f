"""Rows of the hub's columns, as small local files, to problems and prompts."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from megatron_multiverse.errors import ConfigError, DataError
from megatron_multiverse.evaluation.tasks import TASKS, load_problems


def rows(tmp_path: Path, *fields: dict[str, Any]) -> str:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in fields))
    return str(file)


@pytest.mark.parametrize(
    ("fields", "gold"),
    [
        ({"id": 60, "problem": "q", "solution": "s", "answer": "204", "url": "u", "year": "2024"}, "204"),
        ({"ID": "2024-I-1", "Problem": "q", "Solution": "s", "Answer": 204}, "204"),
        ({"problem": "q", "solution": r"\boxed{204}", "id": 1}, "204"),
        ({"problem": "q", "solution": r"\boxed{1}? No: $\boxed{3}$ and $\boxed{4}$."}, "3, 4"),
        ({"problem": "q", "answer": r"$\boxed{3}$, $\boxed{4}$"}, "3, 4"),
        ({"problem_idx": 1, "problem": "q", "answer": 204}, "204"),
        ({"problem": "q", "solution": "s", "answer": r"\left(3, \pi\right)", "unique_id": "x"}, r"\left(3, \pi\right)"),
    ],
)
def test_columns_of_the_hub(tmp_path: Path, fields: dict[str, Any], gold: str) -> None:
    (problem,) = load_problems("aime24", rows(tmp_path, fields), None)
    assert problem.gold == gold
    assert problem.prompt("none") == f"q\n\n{TASKS['aime24'].instruction}"
    assert problem.prompt("parallel").endswith("}. Think step by step and in parallel before answering.")
    assert problem.prompt("sequential").endswith("}. Think step by step before answering.")


def test_choices_stand_in_an_order_that_follows_from_their_text(tmp_path: Path) -> None:
    asked = [
        {"Question": f"q{k}", "Correct Answer": "right\n", **{f"Incorrect Answer {j}": f"wrong {j}" for j in (1, 2, 3)}}
        for k in range(40)
    ]
    file = tmp_path / "gpqa.csv"
    with file.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, asked[0])
        writer.writeheader()
        writer.writerows(asked)
    problems = load_problems("gpqa_diamond", str(file), None)
    assert {problem.gold for problem in problems} == set("ABCD")
    for problem in problems:
        assert f"\n{problem.gold}) right\n" in problem.question
        assert problem.grade(f"so\nAnswer: {problem.gold}") == (problem.gold, True)
    backwards = load_problems("gpqa_diamond", rows(tmp_path, *reversed(asked)), None)
    assert backwards[::-1] == problems


HUB = {
    "aime24": ("HuggingFaceH4/aime_2024", None, "train"),
    "aime25": ("math-ai/aime25", None, "test"),
    "aime26": ("evalscope/aime26", None, "test"),
    "hmmt25": ("MathArena/hmmt_feb_2025", None, "train"),
    "math500": ("HuggingFaceH4/MATH-500", None, "test"),
    "gpqa_diamond": ("Idavidrein/gpqa", "gpqa_diamond", "train"),
}


@pytest.mark.parametrize("task", TASKS)
def test_tasks_come_from_the_hub_through_datasets(task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(path: str, name: str | None, *, split: str) -> datasets.Dataset:
        asked.append((path, name, split))
        choices = {f"Incorrect Answer {k}": f"{k}" for k in (1, 2, 3)}
        row = {"Question": "q", "Correct Answer": "4", **choices} if name else {"problem": "q", "answer": 204}
        return datasets.Dataset.from_list([row])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    (problem,) = load_problems(task, None, None)
    assert asked == [HUB[task]]
    assert problem.gold == "204" or f"\n{problem.gold}) 4\n" in problem.question


def test_limit_and_repeated_questions(tmp_path: Path) -> None:
    source = rows(tmp_path, *({"problem": text, "answer": 1} for text in "aabc"))
    assert [problem.question for problem in load_problems("own", source, 2)] == ["a", "b"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"problem": "q"}, "row 1: none of the columns answer"),
        ({"problem": "q", "solution": "no box"}, "row 1: no answer"),
        ({"problem": " ", "answer": 3}, "row 1: none of the columns problem, question"),
        ({"problem": "q", "answer": ["3"]}, "holds list"),
        ({"Question": "q", "Correct Answer": "a"}, "incorrect answer 1"),
        (
            {"question": "q", "choices": ["a", "b"], "answer": 1},
            "row 1: the choices in choices are not read; name them .* as answer, and leave that column out",
        ),
        ({"question": "q", "Options": {"A": "a"}, "answer": "A"}, "the choices in options are not read"),
        ({"question": "q", "A": 0, "B": "b", "C": "c", "D": "d", "answer": "A"}, "in a, b, c, d .* those columns out"),
    ],
)
def test_rows_that_are_no_problem(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_problems("own", rows(tmp_path, fields), None)


def test_empty_columns_for_choices_are_none(tmp_path: Path) -> None:
    row = {"question": "q", "choices": [], "options": None, "A": "a", "answer": "3"}
    assert load_problems("own", rows(tmp_path, row), None)[0].gold == "3"


def test_dates_are_text_in_a_file_and_refused_where_they_became_times(tmp_path: Path) -> None:
    """`datasets` makes times of them: findings/datasets_json_rewrites_dates_in_strings.sh."""
    datasets = pytest.importorskip("datasets")
    source = rows(tmp_path, {"problem": "When?", "answer": "2024-01-05"})
    assert load_problems("own", source, None)[0].gold == "2024-01-05"
    table = datasets.load_dataset("json", data_files=source, cache_dir=str(tmp_path / "cache"), split="train")
    table.save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(DataError, match=r"'answer' holds datetime, .*give the file as input"):
        load_problems("own", str(tmp_path / "saved"), None)


def test_a_file_that_is_not_utf_8_is_named(tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    file.write_bytes(b"problem,answer\n\xfcber,1\n")
    with pytest.raises(DataError, match=r"rows.csv is not UTF-8 \(byte 0xfc\): save it as UTF-8"):
        load_problems("mine", str(file), None)


def test_tasks_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="known are aime24"):
        load_problems("own", None, None)
    with pytest.raises(ConfigError, match="does not exist"):
        load_problems("aime24", str(tmp_path / "none.jsonl"), None)
    (tmp_path / "bad.jsonl").write_text('{"problem": \n')
    with pytest.raises(DataError, match=r"bad\.jsonl, row 1"):
        load_problems("aime24", str(tmp_path / "bad.jsonl"), None)
