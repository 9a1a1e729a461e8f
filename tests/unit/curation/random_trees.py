"""Random trajectories."""

from __future__ import annotations

import random

from megatron_multiverse.structure import Block, Parts

WORDS = ["we", "add", "the", "number", "to", "both", "sides", "and", "get", "that", "x", "equals", "seven", "so"]


def text(rng: random.Random, lines: int = 3, words: int = 14) -> str:
    """Some lines of words."""
    return "\n".join(" ".join(rng.choices(WORDS, k=rng.randint(3, words))) for _ in range(rng.randint(1, lines)))


def tree(rng: random.Random, depth: int = 2, blocks: int = 2, words: int = 14) -> Parts:
    """Text and blocks in turn, blocks nested at most `depth` deep, with conclusions and outlines."""
    parts: list[str | Block] = [text(rng, words=words)]
    for _ in range(rng.randint(0, blocks) if depth else 0):
        count = rng.randint(2, 3)
        outlines = tuple(text(rng, 1, 6) for _ in range(count))
        paths = tuple(tree(rng, depth - 1, 1, words) for _ in range(count))
        parts += [Block(outlines, paths, text(rng, 1, 8)), text(rng, words=words)]
    return tuple(parts)


def trajectory(seed: int, words: int = 14) -> Parts:
    """A tree with at least one block. Its first line names the seed, so that no two are equal."""
    rng = random.Random(seed)
    while True:
        parts = tree(rng, words=words)
        if len(parts) > 1:
            return (f"Sample {seed} begins here.\n{parts[0]}", *parts[1:-1], f"{parts[-1]}\nSo \\boxed{{{seed}}}.")
