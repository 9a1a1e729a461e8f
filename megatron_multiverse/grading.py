r"""Final answers: where a text states one, and whether two have the same value. Curation and evaluation ask here.

Values are compared by math-verify, whose ways that one would not guess are pinned in tests/unit/test_grading.py.
"""

from __future__ import annotations

import re
from typing import NamedTuple

_TIMEOUT_S = 5
_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)  # a brace after a backslash is a character, as in \{1, 2\}
_BETWEEN_BOXES = re.compile(r"(?:[\s$,;.]|\\[()\[\],;]|\band\b|\bor\b)*")
_STATED = re.compile(r"\b(?:Answer|final answer is)\s*:?\s*(?:\*\*)?[ \t]*(\S[^\n]*)", re.IGNORECASE)
_BRACKETS = re.compile(r"(\\\{|[\[({]).*,.*(\\\}|[\])}])", re.DOTALL)
_LETTER = re.compile(
    r"(?:\\boxed\s*\{\s*(?:\\(?:text|mathrm|textbf|mathbf)\s*\{)?\s*\(?|\banswer\b(?:\s+is)?\s*:?\W{0,8}(?:text\s*\{)?)"
    r"([A-Z])(?![A-Za-z])",
)


class Box(NamedTuple):
    r"""A ``\boxed{...}``: text [start, end) with the braces, and what stands in it."""

    start: int
    end: int
    content: str


def boxes(text: str) -> list[Box]:
    r"""The complete ``\boxed{...}`` of a text, in order; one inside another is part of it."""
    found: list[Box] = []
    for match in _BOX.finditer(text):
        if found and match.start() < found[-1].end:
            continue
        depth = 1
        for brace in _BRACE.finditer(text, match.end()):
            depth += {"{": 1, "}": -1}.get(brace.group(), 0)
            if depth == 0:
                found.append(Box(match.start(), brace.end(), text[match.end() : brace.start()]))
                break
    return found


def stated_answer(text: str) -> str | None:
    r"""The final answer that a response states: its last box, else what follows its last "Answer:".

    Boxes side by side, as in ``\boxed{3} and \boxed{4}``, are one answer, "3, 4". Where the response has ended its
    thought, only what comes after it counts.

    Returns:
        None where the response states no answer.
    """
    text = text.rpartition("</Think>")[2]
    found = boxes(text)
    if found:
        side_by_side = [found[-1]]
        for box in reversed(found[:-1]):
            if not _BETWEEN_BOXES.fullmatch(text, box.end, side_by_side[0].start):
                break
            side_by_side.insert(0, box)
        return ", ".join(box.content.strip() for box in side_by_side)
    stated = _STATED.findall(text)
    return stated[-1].strip() if stated else None


def gold_answer(text: str) -> str:
    """The right answer of a row: what stands in its last boxes, as `stated_answer` reads them, else all of it."""
    stated = stated_answer(text) if boxes(text) else None
    return (stated or text).strip()


def stated_letter(text: str, letters: str) -> str | None:
    """The letter that a response to a multiple-choice question states last, one of `letters`; None without one."""
    found = [letter for letter in _LETTER.findall(_with_capital(text.rpartition("</Think>")[2])) if letter in letters]
    return found[-1] if found else None


def _with_capital(text: str) -> str:
    """The word "answer" in one spelling, so that letters can be told from words by their case."""
    return re.sub(r"\banswer\b", "answer", text, flags=re.IGNORECASE)


def is_right(gold: str, answer: str | None) -> bool:
    """Whether an answer is the gold one: the same words, or by `same_value` the same value."""
    return answer is not None and (gold.split() == answer.split() or same_value(gold, answer))


def same_value(gold: str, answer: str) -> bool:
    r"""Whether math-verify finds the same value in both, each without its ``\boxed``.

    It takes an interval, a tuple and a set of the same numbers for equal; here their brackets must agree, too. The gold
    answer comes first, because math-verify is not symmetric.

    Call it in the main thread only: math-verify bounds its time by an alarm signal.
    """
    from math_verify import parse, verify

    ours, theirs = (_BRACKETS.fullmatch(_without_sizes(text)) for text in (answer, gold))
    if ours and theirs and ours.groups() != theirs.groups():
        return False
    wanted = parse(rf"\boxed{{{gold}}}", parsing_timeout=_TIMEOUT_S)
    given = parse(rf"\boxed{{{answer}}}", parsing_timeout=_TIMEOUT_S)
    return bool(wanted and given) and bool(verify(wanted, given, timeout_seconds=_TIMEOUT_S))


def _without_sizes(text: str) -> str:
    return re.sub(r"\\(?:left|right|[bB]igg?[lr]?)(?![a-zA-Z])|\$", "", text).strip()
