"""Do the evaluators of agree.sh have the same texts and grades, answer by answer?

Reads the folder of their results, and writes what it counts into agree.json there.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

from megatron_multiverse.files import read_lines, write_json_atomic


class Graded(NamedTuple):
    """What an evaluator has for one question."""

    text: str
    is_right: bool


Answers = dict[str, Graded]
"""By question."""


def rows(folder: Path, pattern: str) -> list[dict[str, Any]]:
    """The rows of the one file of JSON Lines that the pattern names."""
    (file,) = folder.glob(pattern)
    return [json.loads(line) for line in read_lines(file)]


def ours(folder: Path) -> Answers:
    """tools/evaluate.py: samples.jsonl."""
    return {row["prompt"]: Graded(row["text"], row["correct"]) for row in rows(folder, "samples.jsonl")}


def lm_eval(folder: Path) -> Answers:
    """lm-eval with --log_samples."""
    return {
        row["doc"]["question"]: Graded(row["resps"][0][0], row["exact_match"] == 1)
        for row in rows(folder, "**/samples_multiverse_arithmetic_*.jsonl")
    }


def evalscope(folder: Path, questions: list[str]) -> Answers:
    """evalscope: one review for each answer."""
    found = {}
    for row in rows(folder, "**/reviews/quickstart/general_qa_arithmetic.jsonl"):
        score = row["sample_score"]["score"]
        found[questions[row["index"]]] = Graded(score["prediction"], score["value"]["Rouge-L-F"] > 1 - 1e-6)
    return found


def main() -> None:
    """Print one line for each evaluator; exit with 1 where they differ."""
    folder = Path(sys.argv[1])
    questions = [row["question"] for row in rows(Path(__file__).parent, "arithmetic.jsonl")]
    wanted = ours(folder / "ours-false")
    others = {
        "tools/evaluate.py, chat": ours(folder / "ours-true"),
        "lm-eval, completions": lm_eval(folder / "lm-eval-false"),
        "lm-eval, chat": lm_eval(folder / "lm-eval-true"),
        "evalscope, chat": evalscope(folder / "evalscope", questions),
    }
    right = sum(graded.is_right for graded in wanted.values())
    agree = 0 < right < len(questions) == len(wanted)
    counts: dict[str, dict[str, int]] = {}
    print(f"tools/evaluate.py, completions: {right} of {len(questions)} right")
    for name, found in others.items():
        texts = sum(found[question].text.strip() == wanted[question].text.strip() for question in questions)
        grades = sum(found[question].is_right == wanted[question].is_right for question in questions)
        print(f"{name}: the same text for {texts}, the same grade for {grades} of {len(questions)}")
        counts[name] = {"same_text": texts, "same_grade": grades}
        agree = agree and texts == grades == len(questions)
    packages = [
        (folder.parent / name / "done").read_text(encoding="utf-8").strip() for name in ("lm-eval", "evalscope")
    ]
    write_json_atomic(
        folder / "agree.json",
        {"packages": packages, "questions": len(questions), "right": right, "beside_completions": counts},
    )
    sys.exit(0 if agree else "the evaluators differ")


if __name__ == "__main__":
    main()
