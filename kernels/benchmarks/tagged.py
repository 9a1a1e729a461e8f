"""Token ids with tags for the benchmark of the scan: what real microbatches hold, and the extremes."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable

import torch
from torch import Tensor

from megatron_multiverse.kernels.benchmarks.layouts import (
    CONCLUSION,
    DOCUMENTS,
    HAS_NESTED,
    NESTED_PATH,
    OUTLINE,
    PATH,
    PATHS_PER_BLOCK,
    Quantiles,
    draw,
)
from megatron_multiverse.kernels.benchmarks.layouts import TEXT as MEAN_TEXT

TAG_IDS = tuple(range(1000, 1012))
"""In the order of `structure.tags.TAGS`."""
TEXT = 7
_, _, *_BLOCK_TAGS = TAG_IDS

Ids = list[int]


def text(count: int) -> Ids:
    """Plain tokens."""
    return [TEXT] * max(0, count)


def block(paths: list[Ids], *, outline: int = 20, conclusion: int = 60) -> Ids:
    """One parallel block around what its paths hold."""
    (parallel, end_parallel, goal, end_goal, outline_tag, end_outline,
     path_tag, end_path, conclusion_tag, end_conclusion) = _BLOCK_TAGS  # fmt: skip
    ids = [parallel, TEXT, goal, TEXT]
    for _ in paths:
        ids += [outline_tag, *text(outline), end_outline, TEXT]
    ids += [end_goal]
    for path in paths:
        ids += [TEXT, path_tag, *path, end_path]
    return [*ids, TEXT, conclusion_tag, *text(conclusion), end_conclusion, TEXT, end_parallel]


def _paths(rng: random.Random, quantiles: Quantiles) -> list[Ids]:
    """Paths of a block with the statistics of the data, without what may be nested in them."""
    count = rng.choices(list(PATHS_PER_BLOCK), list(PATHS_PER_BLOCK.values()))[0]
    return [text(draw(rng, quantiles) - 3) for _ in range(count)]


def document(rng: random.Random, n: int) -> Ids:
    """n tokens with the statistics of the data (see `layouts.document`)."""
    ids: Ids = []
    while True:
        paths = _paths(rng, PATH)
        for k, path in enumerate(paths):
            inner = block(_paths(rng, NESTED_PATH), outline=draw(rng, OUTLINE), conclusion=draw(rng, CONCLUSION))
            if len(inner) + 8 < len(path) and rng.random() < HAS_NESTED:
                paths[k] = [TEXT, *inner, *text(len(path) - len(inner) - 1)]
        piece = text(round(rng.expovariate(1 / MEAN_TEXT)))
        piece += block(paths, outline=draw(rng, OUTLINE), conclusion=draw(rng, CONCLUSION))
        if len(ids) + len(piece) > n:
            return ids + text(n - len(ids))
        ids += piece


def _realistic(n: int) -> list[Ids]:
    """One long document with the statistics of the data."""
    return [document(random.Random(0), n)]


def _wide(n: int) -> list[Ids]:
    """One block of 8 paths over most of the sequence."""
    ids = text(n // 32) + block([text(n * 7 // 72)] * 8)
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


TAGGED: dict[str, Callable[[int], list[Ids]]] = {
    "causal": lambda n: [text(n)],
    "realistic": _realistic,
    "wide": _wide,
    "deep": _deep,
    "packed": _packed,
}


def make_ids(name: str, n: int, *, rows: int = 32) -> tuple[Tensor, Tensor]:
    """ids int64 [1, n] and documents int32 [1, rows, 2] on the CPU of layout `name`; responses start at once."""
    parts = TAGGED[name](n)
    ids = [token for part in parts for token in part][:n]
    starts = [sum(map(len, parts[:k])) for k in range(len(parts))]
    starts += [n] * (rows - len(starts))
    documents = torch.tensor([[start, start] for start in starts], dtype=torch.int32)
    return torch.tensor(ids)[None], documents[None]
