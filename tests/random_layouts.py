"""Labels of random documents, from the structure package's own layout rule."""

from __future__ import annotations

import random
from itertools import pairwise

import torch

from megatron_multiverse.structure import BlockSpan, Document, PathSpan, lay_out, pack_layouts


def _blocks(rng: random.Random, start: int, end: int, depth: int) -> list[BlockSpan]:
    """Random blocks over text [start, end), nested at most `depth` deep."""
    blocks: list[BlockSpan] = []
    cursor = start
    while depth > 0 and end - cursor >= 6 and rng.random() < 0.75:
        first = cursor + rng.randint(1, max(1, (end - cursor) // 4))
        last = rng.randint(first + 2, end)
        cuts = sorted(rng.sample(range(first + 1, last), min(rng.randint(0, 4), last - first - 1)))
        borders = [first, *cuts, last]
        paths = [PathSpan(a, b, a, blocks=_blocks(rng, a, b, depth - 1)) for a, b in pairwise(borders)]
        blocks.append(BlockSpan(first - 1, goal_end=first, paths=paths, forced_end=last, end=last))
        cursor = last
    return blocks


def random_labels(num_tokens: int, seed: int, *, max_documents: int = 3, depth: int = 4) -> torch.Tensor:
    """int32 labels r [num_tokens] of a pack of up to `max_documents` documents with nested blocks."""
    rng = random.Random(seed)
    count = min(rng.randint(1, max_documents), num_tokens)
    borders = [0, *sorted(rng.sample(range(1, num_tokens), count - 1)), num_tokens]
    parts = []
    for a, b in pairwise(borders):
        parts.append(lay_out(Document(b - a, 0, _blocks(rng, 0, b - a, depth))))
    return torch.from_numpy(pack_layouts(parts).r)
