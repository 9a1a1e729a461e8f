"""What the two tasks of the miniature have in common: the kinds of text, and labels that start anywhere."""

from __future__ import annotations

from typing import Literal

Text = Literal["plain", "tagged"]
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def shift_labels(text: str, prefix: str, start: int, count: int) -> str:
    """The labels of the outermost block counted from `start`, and those of the blocks inside it with them."""
    if start == 1:
        return text
    for number in reversed(range(1, count + 1)):  # the last first, so that no label is shifted twice
        for end in (":", "."):
            text = text.replace(f"\n{prefix}{number}{end}", f"\n{prefix}{number + start - 1}{end}")
    return text
