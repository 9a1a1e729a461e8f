"""The two tasks of the miniature: chains of calculations side by side, and satisfiability by case splitting.

Each problem renders itself for a kind of training row: `plain` is the work in sequence, without tags; `tagged` is the
work as parallel blocks. Whether a tagged row is read one token after the other or as branches is the business of
`training_rows.py`. Every answer can be checked without the text that led to it.
"""

from __future__ import annotations

from chains import Arithmetic, sample_arithmetic
from search import Satisfiability, sample_satisfiability
from texts import Text

__all__ = ["REQUESTS", "Arithmetic", "Problem", "Satisfiability", "check", "sample_arithmetic", "sample_satisfiability"]

Problem = Arithmetic | Satisfiability
REQUESTS: dict[Text, str] = {
    "plain": " Think step by step before answering.",
    "tagged": " Think step by step and in parallel before answering.",
}


def check(problem: Problem, text: str) -> bool:
    """Whether the last ``Answer:`` line of a text is right."""
    head, found, answer = text.rpartition("Answer: ")
    return bool(found) and (not head or head.endswith("\n")) and problem.is_right(answer.strip())
