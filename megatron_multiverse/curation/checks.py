"""What a curated text has to hold: the words of the original, its answer, and paths that stand alone."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

from megatron_multiverse.curation.trees import plain_text
from megatron_multiverse.grading import boxes, same_value
from megatron_multiverse.structure import Block

_TRANSITION = re.compile(
    r"(?:Alternatively|Next|Then|Finally|Similarly|Likewise|Furthermore|Moreover|Additionally|Secondly|Thirdly|Lastly"
    r"|On the other hand|In contrast|Another|Afterwards?|Again)\b",
)
_SIBLING = re.compile(
    r"\b(?:the )?(?:previous|preceding|other|first|second|third|next) (?:paths?|branch(?:es)?)\b"
    r"|\b(?:paths?|branch) (?:\d|above|below)"
    r"|\b(?:as|like) in the (?:previous|other|first|second) (?:case|approach|method|step|part)\b"
    r"|\bthe (?:previous|other) (?:case|approach|method|part)\b",
    re.IGNORECASE,
)
_NUMBER = re.compile(r"(?<![\w.])\d+(?:[.,]\d+)*(?![\w])")
_WORKED_OUT = re.compile(r"(?:=|≈|\\approx|\\equiv|:)\s*\$?\s*-?\s*$")
_MIN_DIGITS = 3


def distance(text: str, original: str) -> float:
    """Levenshtein distance divided by the length of the longer text, from 0 (equal) to 1."""
    from rapidfuzz.distance import Levenshtein

    return Levenshtein.normalized_distance(text.strip(), original.strip())


def dependences(block: Block, before: str) -> Iterator[str]:
    """Signs that a path of the block depends on another one, inner blocks included; one sentence each.

    This looks at words alone: a transition at the start of a path, the mention of a sibling, and a number of three or
    more digits that an earlier sibling has worked out and a later one takes as given.

    Args:
        block: a rewritten block.
        before: the text that all its paths can see.
    """
    yield from _dependences(block, before, "")


def _dependences(block: Block, before: str, prefix: str) -> Iterator[str]:
    texts = [plain_text(path) for path in block.paths]
    numbers = [_numbers(text) for text in texts]
    for k, (path, text) in enumerate(zip(block.paths, texts, strict=True)):
        label = f"{prefix}{k + 1}"
        if k and (found := _TRANSITION.match(text.lstrip())):
            yield f'path {label} begins with "{found.group()}", which leads over from another path'
        if found := _SIBLING.search(text):
            yield f'path {label} says "{found.group()}"'
        for j in range(k):
            if taken := _not_in(before, numbers[k].given & numbers[j].worked_out):
                yield f"path {label} uses {', '.join(sorted(taken))}, which path {prefix}{j + 1} works out"
        seen = before
        for part in path:
            if isinstance(part, Block):
                yield from _dependences(part, seen, f"{label}.")
            seen += "\n" + (part if isinstance(part, str) else plain_text((part,)))


class _Numbers(NamedTuple):
    """The numbers of a path that have enough digits to be told from chance."""

    given: set[str]
    """First named without being worked out."""
    worked_out: set[str]
    """Worked out somewhere."""


def _not_in(text: str, numbers: set[str]) -> set[str]:
    # Few blocks have a number to look for, and the text before a block is long.
    return numbers - set(_NUMBER.findall(text)) if numbers else numbers


def _numbers(text: str) -> _Numbers:
    seen: set[str] = set()
    found = _Numbers(set(), set())
    for match in _NUMBER.finditer(text):
        number = match.group()
        if sum(map(str.isdigit, number)) < _MIN_DIGITS:
            continue
        if _WORKED_OUT.search(text, max(0, match.start() - 12), match.start()):
            found.worked_out.add(number)
        elif number not in seen:
            found.given.add(number)
        seen.add(number)
    return found


def final_answer(text: str) -> str:
    r"""The content of the last ``\boxed{...}``; without one the last line that is not empty."""
    found = boxes(text)
    return found[-1].content if found else text.strip().rsplit("\n", 1)[-1]


def same_answer(text: str, original: str) -> bool:
    """Whether both texts come to the same final answer: the same words, or by math-verify the same value."""
    ours, theirs = final_answer(text), final_answer(original)
    if ours.split() == theirs.split():
        return True
    return bool(boxes(text) and boxes(original)) and same_value(theirs, ours)
