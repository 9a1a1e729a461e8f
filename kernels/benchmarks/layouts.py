"""Label layouts of the benchmarks: what real microbatches look like, and the extremes."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable

import torch
from torch import Tensor

Spans = list[tuple[int, int]]
Quantiles = tuple[tuple[float, float], ...]

# Statistics of 24 documents of the Multiverse data: 185 blocks, 434 paths, tokens counted as characters / 4.
# Lengths are (share of the cases, tokens); between two points the logarithm is interpolated. The last point of the
# first two is set so that the mean is that of the data, whose longest path (4737) is one of its kind.
PATH: Quantiles = ((0, 8), (0.05, 19), (0.25, 34), (0.5, 79), (0.75, 232), (0.95, 864), (1, 2300))
NESTED_PATH: Quantiles = ((0, 4), (0.05, 7), (0.25, 14), (0.5, 28), (0.75, 48), (0.95, 148), (1, 240))
OUTLINE: Quantiles = ((0, 8), (0.05, 10), (0.25, 16), (0.5, 20), (0.75, 28), (0.95, 49), (1, 94))
CONCLUSION: Quantiles = ((0, 12), (0.05, 21), (0.25, 30), (0.5, 47), (0.75, 77), (0.95, 130), (1, 322))
PATHS_PER_BLOCK = {1: 1, 2: 137, 3: 36, 4: 7, 5: 3, 8: 1}
HAS_NESTED = 0.57
"""Share of the paths with room for a block that have one; makes 52 of 185 blocks nested ones, as in the data."""
TEXT = 640
"""Mean tokens between two blocks; leaves 41 % of the tokens in paths, as in the data."""
DOCUMENTS = (
    10300, 4600, 6800, 3300, 2200, 4300, 8800, 13300, 7900, 7400, 4800, 13400,
    4500, 5100, 5000, 10100, 5900, 2900, 5100, 8200, 9100, 9200, 7200, 9700,
)  # fmt: skip
"""Tokens of each of the documents."""


class Labels:
    """Collects r and the number of visible pairs of one sequence of n tokens."""

    def __init__(self, n: int) -> None:
        self.r = torch.arange(n, dtype=torch.int64)
        self.pairs = n * (n + 1) // 2
        self.in_paths = 0
        """Tokens in paths of outer blocks."""

    def block(self, spans: Spans) -> None:
        """Add a block whose paths are the adjoining spans; inner blocks may come before or after."""
        start, end = spans[0][0], spans[-1][1]
        for a, b in spans:
            self.r[a:b] += (end - b) - (a - start)
        self.pairs -= ((end - start) ** 2 - sum((b - a) ** 2 for a, b in spans)) // 2


def draw(rng: random.Random, quantiles: Quantiles) -> int:
    """A length distributed as the quantiles say."""
    share = rng.random()
    for (low, first), (high, last) in itertools.pairwise(quantiles):
        if share <= high:
            part = (share - low) / (high - low)
            return round(math.exp((1 - part) * math.log(first) + part * math.log(last)))
    raise AssertionError("quantiles end with 1")


def _paths(rng: random.Random, start: int, quantiles: Quantiles) -> Spans:
    """Adjoining paths from `start` on."""
    count = rng.choices(list(PATHS_PER_BLOCK), list(PATHS_PER_BLOCK.values()))[0]
    spans: Spans = []
    for _ in range(count):
        end = start + draw(rng, quantiles)
        spans.append((start, end))
        start = end
    return spans


def document(labels: Labels, rng: random.Random, start: int, end: int) -> None:
    """One document with the statistics of the data in the tokens from start to end."""
    i = start
    while True:
        i += round(rng.expovariate(1 / TEXT))
        spans = _paths(rng, i, PATH)
        goal = sum(draw(rng, OUTLINE) for _ in spans)
        spans = [(a + goal, b + goal) for a, b in spans]
        i = spans[-1][1] + draw(rng, CONCLUSION)
        if i > end:
            return
        labels.block(spans)
        labels.in_paths += spans[-1][1] - spans[0][0]
        for a, b in spans:
            inner = _paths(rng, a + sum(draw(rng, OUTLINE) for _ in range(2)), NESTED_PATH)
            if inner[-1][1] + draw(rng, CONCLUSION) < b and rng.random() < HAS_NESTED:
                labels.block(inner)


def _causal(n: int, labels: Labels) -> None:
    """No tags."""


def _realistic(n: int, labels: Labels) -> None:
    """One long document with the statistics of the data."""
    document(labels, random.Random(0), 0, n)


def _long_paths(n: int, labels: Labels) -> None:
    """Harder than the data: 2 to 5 paths of 300 to 1200 tokens with text between them and one nested block each."""
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


def _wide(n: int, labels: Labels) -> None:
    """One block of 8 paths over 7/8 of the sequence."""
    length, start = n * 7 // 64, n // 16
    labels.block([(start + k * length, start + (k + 1) * length) for k in range(8)])


def _deep(n: int, labels: Labels) -> None:
    """Blocks of 3 paths, nested 3 deep."""

    def nest(start: int, end: int, depth: int) -> None:
        third = (end - start) // 4
        spans = [(start + (k + 1) * third, start + (k + 2) * third) for k in range(3)]
        labels.block(spans)
        if depth > 1:
            for a, b in spans:
                nest(a, b, depth - 1)

    nest(0, n, 3)


def _packed(n: int, labels: Labels) -> None:
    """Documents of the lengths of the data, one after the other; the last one is cut."""
    rng, start = random.Random(1), 0
    ends: list[int] = []
    while start < n:
        ends.append(min(start + rng.choice(DOCUMENTS), n))
        start = ends[-1]
    documents = list(zip([0, *ends], ends, strict=False))
    labels.block(documents)
    for start, end in documents:
        document(labels, rng, start, end)


LAYOUTS: dict[str, Callable[[int, Labels], None]] = {
    "causal": _causal,
    "realistic": _realistic,
    "long-paths": _long_paths,
    "wide": _wide,
    "deep": _deep,
    "packed": _packed,
}


def make_labels(name: str, n: int) -> tuple[Tensor, int]:
    """r int32 [1, n] on the CPU and the number of visible pairs of layout `name`."""
    labels = Labels(n)
    LAYOUTS[name](n, labels)
    return labels.r[None].int(), labels.pairs
