"""Token ids with tags for the benchmark of the scan: what real microbatches hold, and the extremes."""

from __future__ import annotations

import random
from collections.abc import Callable

import torch
from torch import Tensor

TAG_IDS = tuple(range(1000, 1012))
"""In the order of `structure.tags.TAGS`."""
TEXT = 7
(_, _, PARALLEL, END_PARALLEL, GOAL, END_GOAL,
 OUTLINE, END_OUTLINE, PATH, END_PATH, CONCLUSION, END_CONCLUSION) = TAG_IDS  # fmt: skip

Ids = list[int]


def text(count: int) -> Ids:
    """Plain tokens."""
    return [TEXT] * max(0, count)


def block(paths: list[Ids], *, outline: int = 20, conclusion: int = 60) -> Ids:
    """One parallel block around what its paths hold."""
    ids = [PARALLEL, TEXT, GOAL, TEXT]
    for _ in paths:
        ids += [OUTLINE, *text(outline), END_OUTLINE, TEXT]
    ids += [END_GOAL]
    for path in paths:
        ids += [TEXT, PATH, *path, END_PATH]
    return [*ids, TEXT, CONCLUSION, *text(conclusion), END_CONCLUSION, TEXT, END_PARALLEL]


def _realistic(n: int) -> list[Ids]:
    """Blocks of 2 to 5 paths of 300 to 1200 tokens with text between them and one nested block each."""
    rng = random.Random(0)
    ids: Ids = text(400)
    while len(ids) < n - 8000:
        ids += text(rng.randint(300, 900))
        paths = [text(rng.randint(300, 1200)) for _ in range(rng.randint(2, 5))]
        third = len(paths[0]) // 3
        paths[0] = text(third // 2) + block([text(third // 2), text(third)]) + text(third // 2)
        ids += block(paths)
    return [ids + text(n - len(ids))]


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
    """Documents of 4096 tokens, every other one with blocks."""
    part = min(n, 4096)
    plain, tagged = text(part), _wide(part)[0]
    return [tagged if k % 2 else plain for k in range(n // part)] + ([text(n % part)] if n % part else [])


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
