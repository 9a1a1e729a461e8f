"""A reasoning chain cut into numbered lines, so that a model can name parts of it instead of copying them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

_LONG_LINE = 400
_SENTENCE_END = re.compile(r"(?<=[.!?])[ \t]+(?=[A-Z\"'(\\$])")


@dataclass(frozen=True)
class Chain:
    """A chain and its lines. Lines count from 1; between two of them stands white space alone."""

    text: str
    spans: tuple[tuple[int, int], ...]
    """Half-open character range of each line."""

    @property
    def num_lines(self) -> int:
        """Number of lines."""
        return len(self.spans)

    def slice(self, first: int, last: int) -> str:
        """The text from line `first` to line `last`, both included, exactly as it stands in the chain."""
        return self.text[self.spans[first - 1][0] : self.spans[last - 1][1]]

    def numbered(self) -> str:
        """The chain for a prompt: ``[1] first line``, one line each."""
        return "\n".join(f"[{k}] {self.text[start:end]}" for k, (start, end) in enumerate(self.spans, 1))


def cut_chain(text: str) -> Chain:
    """Cut a chain at its line breaks, and long lines where a sentence ends.

    Args:
        text: the chain, without structure tags.
    """
    return Chain(text, tuple(_spans(text)))


def _spans(text: str) -> Iterator[tuple[int, int]]:
    for line in re.finditer(r"\S[^\n]*", text):
        end = line.start() + len(line.group().rstrip())
        start = line.start()
        if end - start > _LONG_LINE:
            for gap in _SENTENCE_END.finditer(text, start, end):
                yield start, gap.start()
                start = gap.end()
        yield start, end
