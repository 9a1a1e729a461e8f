r"""Final answers: where a text states one, and whether two have the same value. Curation and evaluation ask here.

Values are compared by math-verify, whose ways that one would not guess are pinned in tests/unit/test_grading.py.
"""

from __future__ import annotations

import math
import re
from typing import Any, NamedTuple

_TIMEOUT_S = 5
_BOX = r"\\(?:boxed|fbox)\s*+\{"
_BOX_OR_BRACE = re.compile(rf"{_BOX}|\\(?!{_BOX}).|[{{}}]", re.DOTALL)
"""A brace after a backslash is a character, as in ``\\{1, 2\\}``."""
_BETWEEN_BOXES = re.compile(
    r"(?:[\s$,;.]|\\[()\[\],;]|\\q?quad\b|\\(?:text|mathrm)\s*\{\s*(?:and|or|,)\s*\}|\band\b|\bor\b)*"
)
_END_OF_THOUGHT = re.compile(r"</think>", re.IGNORECASE)
_WORDS = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mbox)\s*\{([^{}]*)\}")
_STATED = re.compile(r"\banswer(?:\s+is\b)?(?:\*\*)?\s*+:?\s*+(?:\*\*)?+[ \t]*+(\S[^\n]*)", re.IGNORECASE)
_THOUSANDS = re.compile(r"(?<=\d)\\[,;: ](?=\d{3}(?!\d))")
_BRACKETS = re.compile(r"(\\\{|[\[({]).*,.*(\\\}|[\])}])", re.DOTALL)
_REPEATING = re.compile(r"(\d*)\.(\d*)\\overline\s*\{\s*(\d+)\s*\}")
_SMALL, _AS_CLOSE = 1e-3, 1e-3
"""Below `_SMALL`, six decimals leave a number three digits at most; there values must agree by `_AS_CLOSE` of them."""
_LETTER = re.compile(
    r"(?:\\boxed\s*\{\s*(?:\\(?:text|mathrm|textbf|mathbf)\s*\{)?\s*\(?|\banswer\b(?:\s+is)?\s*:?\W{0,8}(?:text\s*\{)?)"
    r"(?:(?i:option|choice)\s+\W{0,3})?([A-Z](?![A-Za-z])|[a-z](?=[)}]|[\].*$ \t]*$))",
    re.MULTILINE,
)


class Box(NamedTuple):
    r"""A ``\boxed{...}``: text [start, end) with the braces, and what stands in it."""

    start: int
    end: int
    content: str


def boxes(text: str) -> list[Box]:
    r"""The complete ``\boxed{...}`` of a text, in order; one inside another is part of it."""
    found: list[Box] = []
    open_braces: list[re.Match[str]] = []  # one pass: a model that writes a box within a box without end is not rare
    for match in _BOX_OR_BRACE.finditer(text):
        if match[0].endswith("{") and match[0] != "\\{":
            open_braces.append(match)
        elif match[0] == "}" and open_braces:
            opening = open_braces.pop()
            if opening[0] != "{":
                while found and found[-1].start > opening.start():
                    found.pop()  # it is part of this one
                found.append(Box(opening.start(), match.end(), text[opening.end() : match.start()]))
    return found


def stated_answer(text: str) -> str | None:
    r"""The final answer that a response states: its last box, else what follows its last "Answer:".

    Boxes side by side, as in ``\boxed{3} and \boxed{4}``, are one answer, "3, 4"; one that is written twice counts
    once. The full stop behind an answer, and the ``**`` of one in bold, are no part of it. Where the response has ended
    its thought, only what comes after it counts.

    Returns:
        None where the response states no answer.
    """
    text = _after_thought(text)
    found = boxes(text)
    if found:
        side_by_side = [found[-1]]
        for box in reversed(found[:-1]):
            if not _BETWEEN_BOXES.fullmatch(text, box.end, side_by_side[0].start):
                break
            side_by_side.insert(0, box)
        return ", ".join(dict.fromkeys(_without_end(box.content) for box in side_by_side))
    stated = _STATED.findall(text)
    return _without_end(stated[-1]) if stated else None


def _without_end(text: str) -> str:
    """An answer without the full stop and the ``**`` that a sentence puts behind it; an ellipsis stays."""
    text = text.strip()
    while text.endswith("**") or (text.endswith(".") and not text.endswith(("..", "\\right."))):
        text = text.removesuffix("**").removesuffix(".").rstrip()
    return text


def _after_thought(text: str) -> str:
    return _END_OF_THOUGHT.split(text)[-1]


def gold_answer(text: str) -> str:
    """The right answer of a row: what stands in its last boxes, as `stated_answer` reads them, else all of it."""
    stated = stated_answer(text) if boxes(text) else None
    return stated or _without_end(text)


def stated_letter(text: str, letters: str) -> str | None:
    """The letter that a response to a multiple-choice question states last, one of `letters`; None without one."""
    stated = (letter.upper() for letter in _LETTER.findall(_with_capital(_after_thought(text))))
    found = [letter for letter in stated if letter in letters]
    return found[-1] if found else None


def _with_capital(text: str) -> str:
    """The word "answer" in one spelling, so that letters can be told from words by their case."""
    return re.sub(r"\banswer\b", "answer", text, flags=re.IGNORECASE)


def is_right(gold: str, answer: str | None) -> bool:
    """Whether an answer is the gold one: the same words, in ``\\text{}`` or not, or by `same_value` the same value."""
    return answer is not None and (_words(gold) == _words(answer) or same_value(gold, answer))


def _words(text: str) -> list[str]:
    return _WORDS.sub(r" \1 ", text).split()


def same_value(gold: str, answer: str) -> bool:
    r"""Whether math-verify finds the same value in both, each without its ``\boxed``.

    It takes an interval, a tuple and a set of the same numbers for equal; here their brackets must agree, too. It
    rounds numbers with a decimal point to six decimals; here small ones must agree in their digits. Repeating decimals,
    which it does not read, are fractions here. The gold answer comes first, because math-verify is not symmetric.

    Call it in the main thread only: math-verify bounds its time by an alarm signal.
    """
    from math_verify import parse, verify

    ours, theirs = (_BRACKETS.fullmatch(_without_sizes(text)) for text in (answer, gold))
    if ours and theirs and ours.groups() != theirs.groups():
        return False
    wanted, given = (
        parse(rf"\boxed{{{_REPEATING.sub(_fraction, _THOUSANDS.sub('', text))}}}", parsing_timeout=_TIMEOUT_S)
        for text in (gold, answer)
    )
    if not (wanted and given) or _differ_in_digits(wanted[0], given[0]):
        return False
    return bool(verify(wanted, given, timeout_seconds=_TIMEOUT_S))


def _fraction(decimal: re.Match[str]) -> str:
    """A repeating decimal as a fraction: 1.2 and 34 over and over is (1234 - 12) / 990."""
    whole, once, period = decimal.groups()
    over = "9" * len(period) + "0" * len(once)
    return rf"\frac{{{int(whole + once + period) - int(whole + once or '0')}}}{{{over}}}"


def _differ_in_digits(wanted: object, given: object) -> bool:
    """Whether both are numbers, or tuples or sets of them, of which small ones are not the same."""
    pairs = zip(_numbers(wanted), _numbers(given), strict=False)
    return any(max(map(abs, pair)) < _SMALL and not math.isclose(*pair, rel_tol=_AS_CLOSE) for pair in pairs)


def _numbers(value: Any) -> list[float]:
    """A number of sympy, or those of a tuple, a set, an interval or an equation by their size; none of a term."""
    from sympy import Expr

    parts = [value] if isinstance(value, Expr) else getattr(value, "args", ())
    return sorted(number for number in map(_number, parts) if number is not None)


def _number(term: Any) -> float | None:
    """The value of a number, or of products and powers of numbers, such as 1.6 * 10^-19; None of anything else. It is
    not sympy that works it out: an answer may be a tower of powers, at which it would never end."""
    from sympy import Integer, Mul, Number, Pow

    try:
        if isinstance(term, Number):
            return float(term)
        if isinstance(term, Mul):
            factors = [_number(factor) for factor in term.args]
            return None if None in factors else math.prod(factor for factor in factors if factor is not None)
        if isinstance(term, Pow) and isinstance(term.exp, Integer) and (base := _number(term.base)) is not None:
            return float(base ** float(term.exp))
    except (OverflowError, ZeroDivisionError, ValueError):
        return None
    return None


def _without_sizes(text: str) -> str:
    return re.sub(r"\\(?:left|right|[bB]igg?[lr]?)(?![a-zA-Z])|\$", "", text).strip()
