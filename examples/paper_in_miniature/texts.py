"""What the two tasks of the miniature have in common: the kinds of text, and labels that start anywhere."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

Text = Literal["plain", "tagged"]
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def relabel(text: str, prefix: str, labels: Sequence[int], count: int) -> str:
    """The first `count` of these numbers, which rise from 1 or more, as the labels of the outermost block instead of 1,
    2, ...; the labels of the blocks inside it change with them."""
    for number in reversed(range(1, count + 1)):  # the last first, so that no label is changed twice
        for end in (":", "."):
            text = text.replace(f"\n{prefix}{number}{end}", f"\n{prefix}{labels[number - 1]}{end}")
    return text
