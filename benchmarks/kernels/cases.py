"""The cases that benchmarks run on, as token ids: what real microbatches look like, and the extremes.

Labels come from the one rule (`structure_scan_reference`), visible pairs from counting them.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable

import torch
from torch import Tensor

from megatron_multiverse.kernels.multiverse_attention import count_visible_pairs
from megatron_multiverse.kernels.structure_scan import structure_scan_reference
from megatron_multiverse.structure import TAGS

Ids = list[int]
Quantiles = tuple[tuple[float, float], ...]

# Statistics of 24 documents of the Multiverse data: 185 blocks, 434 paths, tokens counted as characters / 4.
# Lengths are given as points (share of all lengths below, tokens), between which the logarithm is interpolated. The
# last point of the first two is chosen so that the mean is that of the data, whose longest path (4737 tokens) is an
# outlier.
PATH: Quantiles = ((0, 8), (0.05, 19), (0.25, 34), (0.5, 79), (0.75, 232), (0.95, 864), (1, 2300))
NESTED_PATH: Quantiles = ((0, 4), (0.05, 7), (0.25, 14), (0.5, 28), (0.75, 48), (0.95, 148), (1, 240))
OUTLINE: Quantiles = ((0, 8), (0.05, 10), (0.25, 16), (0.5, 20), (0.75, 28), (0.95, 49), (1, 94))
CONCLUSION: Quantiles = ((0, 12), (0.05, 21), (0.25, 30), (0.5, 47), (0.75, 77), (0.95, 130), (1, 322))
PATHS_PER_BLOCK = {1: 1, 2: 137, 3: 36, 4: 7, 5: 3, 8: 1}
HAS_NESTED = 0.57
"""Share of the paths with room for a block that have one. It makes 52 of 185 blocks nested ones, as in the data."""
TEXT = 640
"""Mean number of tokens between two blocks. It leaves 41 % of the tokens in paths, as in the data."""
DOCUMENTS = (
    10300, 4600, 6800, 3300, 2200, 4300, 8800, 13300, 7900, 7400, 4800, 13400,
    4500, 5100, 5000, 10100, 5900, 2900, 5100, 8200, 9100, 9200, 7200, 9700,
)  # fmt: skip
"""Tokens of each of the documents."""

TAG_IDS = tuple(range(1000, 1000 + len(TAGS)))
"""In the order of `structure.TAGS`."""
WORD = 7
"""The id of every token of text."""
_, _, *_BLOCK_TAGS = TAG_IDS


def text(count: int) -> Ids:
    """Plain tokens."""
    return [WORD] * max(0, count)


def block(paths: list[Ids], *, outline: int = 20, conclusion: int = 60) -> Ids:
    """One parallel block around what its paths hold."""
    (parallel, end_parallel, goal, end_goal, outline_tag, end_outline,
     path_tag, end_path, conclusion_tag, end_conclusion) = _BLOCK_TAGS  # fmt: skip
    ids = [parallel, WORD, goal, WORD]
    for _ in paths:
        ids += [outline_tag, *text(outline), end_outline, WORD]
    ids += [end_goal]
    for path in paths:
        ids += [WORD, path_tag, *path, end_path]
    return [*ids, WORD, conclusion_tag, *text(conclusion), end_conclusion, WORD, end_parallel]


def draw(rng: random.Random, quantiles: Quantiles) -> int:
    """A length distributed as the quantiles say."""
    share = rng.random()
    for (low, first), (high, last) in itertools.pairwise(quantiles):
        if share <= high:
            part = (share - low) / (high - low)
            return round(math.exp((1 - part) * math.log(first) + part * math.log(last)))
    raise AssertionError("quantiles end with 1")


def _paths(rng: random.Random, quantiles: Quantiles) -> list[Ids]:
    """Paths of a block with the statistics of the data, without nested blocks. Three tokens of a path are its gap and
    its tags, which `block` adds."""
    count = rng.choices(list(PATHS_PER_BLOCK), list(PATHS_PER_BLOCK.values()))[0]
    return [text(draw(rng, quantiles) - 3) for _ in range(count)]


def document(rng: random.Random, n: int) -> Ids:
    """n tokens with the statistics of the data."""
    ids: Ids = []
    while True:
        paths = _paths(rng, PATH)
        for k, path in enumerate(paths):
            inner = block(_paths(rng, NESTED_PATH), outline=draw(rng, OUTLINE), conclusion=draw(rng, CONCLUSION))
            if len(inner) + 8 < len(path) and rng.random() < HAS_NESTED:
                paths[k] = [WORD, *inner, *text(len(path) - len(inner) - 1)]
        piece = text(round(rng.expovariate(1 / TEXT)))
        piece += block(paths, outline=draw(rng, OUTLINE), conclusion=draw(rng, CONCLUSION))
        if len(ids) + len(piece) > n:
            return ids + text(n - len(ids))
        ids += piece


def _realistic(n: int) -> list[Ids]:
    """One long document with the statistics of the data."""
    return [document(random.Random(0), n)]


def _long_paths(n: int) -> list[Ids]:
    """Harder than the data: 2 to 5 paths of 300 to 1200 tokens with text between them and one nested block each."""
    rng, ids = random.Random(0), text(400)
    while True:
        paths = [text(rng.randint(300, 1200)) for _ in range(rng.randint(2, 5))]
        third = len(paths[0]) // 3
        paths[0] = text(third // 2) + block([text(third // 2), text(third)], outline=4, conclusion=10)
        piece = text(rng.randint(300, 900)) + block(paths)
        if len(ids) + len(piece) > n:
            return [ids + text(n - len(ids))]
        ids += piece


def _wide(n: int) -> list[Ids]:
    """One block of 8 paths over 7/8 of the sequence."""
    ids = text(n // 16 - 250) + block([text(n * 7 // 64 - 3)] * 8)
    return [ids + text(n - len(ids))]


def _deep(n: int) -> list[Ids]:
    """Blocks of 3 paths, nested 3 deep."""

    def nest(room: int, depth: int) -> Ids:
        if depth == 0:
            return text(room)
        inner = (room - 200) // 4
        return text(inner) + block([nest(inner, depth - 1) for _ in range(3)])

    ids = nest(n, 3)
    return [ids + text(n - len(ids))]


def _packed(n: int) -> list[Ids]:
    """Documents of the data's lengths with its statistics, the last one shorter."""
    rng, parts, room = random.Random(0), [], n
    for length in itertools.cycle(DOCUMENTS):
        parts.append(document(rng, min(length, room)))
        room -= len(parts[-1])
        if room == 0:
            return parts
    raise AssertionError("a cycle does not end")


CASES: dict[str, Callable[[int], list[Ids]]] = {
    "causal": lambda n: [text(n)],
    "realistic": _realistic,
    "long-paths": _long_paths,
    "wide": _wide,
    "deep": _deep,
    "packed": _packed,
}
"""Name -> number of tokens -> the ids of each packed document. Results call a case by the column `layout`."""


def make_ids(name: str, n: int, *, rows: int = 32) -> tuple[Tensor, Tensor]:
    """ids int64 [1, n] and documents int32 [1, rows, 2] of case `name`, on the CPU; no document has a prompt."""
    parts = CASES[name](n)
    ids = [token for part in parts for token in part]
    if len(ids) != n:
        raise ValueError(f"case {name} needs more than {n} tokens: give a larger length")
    starts = [sum(map(len, parts[:k])) for k in range(len(parts))]
    starts += [n] * (rows - len(starts))
    documents = torch.tensor([[start, start] for start in starts], dtype=torch.int32)
    return torch.tensor(ids)[None], documents[None]


def make_labels(name: str, n: int, device: str = "cpu") -> tuple[Tensor, int]:
    """r int32 [1, n] of case `name` on the device, and the number of its visible pairs, which a CPU counts slowly."""
    r = make_r(name, n, device)
    return r, int(count_visible_pairs(r))


def make_r(name: str, n: int, device: str = "cpu") -> Tensor:
    """r int32 [1, n] of case `name` on the device."""
    return structure_scan_reference(*make_ids(name, n), torch.tensor(TAG_IDS)).r.to(device)
