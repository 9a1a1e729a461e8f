"""Label layouts of the benchmarks: what real microbatches look like, and the extremes."""

from __future__ import annotations

import random
from collections.abc import Callable

import torch
from torch import Tensor

Spans = list[tuple[int, int]]


class _Labels:
    """Collects r and the number of visible pairs of one sequence of n tokens."""

    def __init__(self, n: int) -> None:
        self.r = torch.arange(n, dtype=torch.int64)
        self.pairs = n * (n + 1) // 2

    def block(self, spans: Spans) -> None:
        """Add a block whose paths are the adjoining spans; inner blocks may come before or after."""
        start, end = spans[0][0], spans[-1][1]
        for a, b in spans:
            self.r[a:b] += (end - b) - (a - start)
        self.pairs -= ((end - start) ** 2 - sum((b - a) ** 2 for a, b in spans)) // 2


def _causal(n: int, labels: _Labels) -> None:
    """No tags."""


def _realistic(n: int, labels: _Labels) -> None:
    """Blocks of 2 to 5 paths of 300 to 1200 tokens with text between them and one nested block each."""
    rng, i = random.Random(0), 400
    while i < n - max(1500, n // 6):
        i += rng.randint(300, 900)
        spans: Spans = []
        for _ in range(rng.randint(2, 5)):
            length = rng.randint(300, 1200)
            spans.append((i, i + length))
            i += length
        if i > n - 100:
            break
        labels.block(spans)
        a, b = spans[0]
        third = (b - a) // 3
        labels.block([(a + third // 2, a + third), (a + third, a + 2 * third)])
        i += rng.randint(60, 200)


def _wide(n: int, labels: _Labels) -> None:
    """One block of 8 paths over 7/8 of the sequence."""
    length, start = n * 7 // 64, n // 16
    labels.block([(start + k * length, start + (k + 1) * length) for k in range(8)])


def _deep(n: int, labels: _Labels) -> None:
    """Blocks of 3 paths, nested 3 deep."""

    def nest(start: int, end: int, depth: int) -> None:
        third = (end - start) // 4
        spans = [(start + (k + 1) * third, start + (k + 2) * third) for k in range(3)]
        labels.block(spans)
        if depth > 1:
            for a, b in spans:
                nest(a, b, depth - 1)

    nest(0, n, 3)


def _packed(n: int, labels: _Labels) -> None:
    """Four documents, the second and third with a wide block."""
    quarter = n // 4
    labels.block([(k * quarter, (k + 1) * quarter if k < 3 else n) for k in range(4)])
    for k in (1, 2):
        length = quarter // 5
        labels.block([(k * quarter + (p + 1) * length // 2, k * quarter + (p + 2) * length // 2) for p in range(6)])


LAYOUTS: dict[str, Callable[[int, _Labels], None]] = {
    "causal": _causal,
    "realistic": _realistic,
    "wide": _wide,
    "deep": _deep,
    "packed": _packed,
}


def make_labels(name: str, n: int) -> tuple[Tensor, int]:
    """r int32 [1, n] on the CPU and the number of visible pairs of layout `name`."""
    labels = _Labels(n)
    LAYOUTS[name](n, labels)
    return labels.r[None].int(), labels.pairs
