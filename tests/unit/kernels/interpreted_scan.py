"""The scan's kernels in Triton's CPU interpreter beside the reference. Run as a program, see interpreted.py."""

from __future__ import annotations

import os
import random
import sys
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"
sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from quick_interpreter import quicken
from random_tags import TAG_IDS, damage, deep_tags, make_pack, random_pack, random_tags, words, write

from megatron_multiverse.kernels.structure_scan import structure_scan_reference
from megatron_multiverse.kernels.structure_scan.triton_scan import structure_scan_triton
from megatron_multiverse.structure import Tag

quicken()
torch.set_num_threads(1)
torch.use_deterministic_algorithms(True)  # fills what torch.empty returns, so that nothing is read unwritten
TAGS = torch.tensor(TAG_IDS)


def compare(ids: torch.Tensor, documents: torch.Tensor, *, block: int = 32) -> None:
    """Kernels and reference on ids [b, s] and documents [b, D, 2]."""
    want = structure_scan_reference(ids, documents, TAGS)
    got = structure_scan_triton(ids, documents, TAGS, block=block, borders=16, chunk=128)
    assert got.difference(want) is None


def check_random() -> None:
    """Packs with prompts, damage, nesting, empty documents; blocks smaller than a document's tags, so carries count."""
    for seed in range(24):
        pack = random_pack(seed, documents=3, depth=1 + seed % 3, width=3, text=3)
        if len(pack.ids) <= 1200:
            compare(pack.ids[None], pack.documents[None], block=16 if seed % 2 else 64)


def check_malformed() -> None:
    """Damaged documents between sound ones."""
    rng = random.Random(7)
    for _ in range(12):
        sound = [(words(rng, 3), write(rng, random_tags(rng, 1, width=2), text=2)) for _ in range(2)]
        tags = damage(rng, random_tags(rng, 2, width=2))
        pack = make_pack([sound[0], (words(rng, 3), write(rng, tags, text=2)), sound[1]])
        compare(pack.ids[None], pack.documents[None])


def check_counts() -> None:
    """Blocks that have not as many paths as outlines, also where another block makes up for it: outer and inner, two in
    a row. One document each, in one row."""

    def block(outlines: int, paths: list[list[int]]) -> list[int]:
        inside = [tag for path in paths for tag in (8, *path, 9)]
        return [2, 4, *[6, 7] * outlines, 5, *inside, 10, 11, 3]

    counts = [(a, b) for a in (1, 2, 3) for b in (1, 2, 3)]
    documents = [block(*outer[:1], [block(*inner[:1], [[]] * inner[1]), *[[]] * (outer[1] - 1)]) for outer in counts
                 for inner in ((1, 1), (2, 1), (1, 2), (3, 2))]  # fmt: skip
    documents += [block(a, [[]] * b) + block(c, [[]] * d) for a, b in counts[:6] for c, d in ((2, 2), (1, 3), (3, 1))]
    pack = make_pack([([], write(random.Random(k), [*map(Tag, tags)], text=1)) for k, tags in enumerate(documents)])
    assert sum(pack.malformed) == len(documents) - 5
    compare(pack.ids[None], pack.documents[None])


def check_extremes() -> None:
    """Depth 8 and 9, tags alone, no tags, one token, a batch of two rows, many documents."""
    rng = random.Random(3)
    for depth in (8, 9):
        pack = make_pack([([], write(rng, deep_tags(depth), text=1)), ([], [*write(rng, [], text=9), TAG_IDS[0]])])
        compare(pack.ids[None], pack.documents[None])
    dense = torch.tensor([TAG_IDS[tag] for tag in deep_tags(3)])
    compare(dense[None], torch.tensor([[[0, 0]]], dtype=torch.int32))
    for length in (1, 127, 128, 129, 256):
        compare(torch.full((1, length), 50), torch.tensor([[[0, 0], [length, length]]], dtype=torch.int32))
    many = make_pack([([], write(rng, random_tags(rng, 1, width=1), text=2)) for _ in range(20)], unused=3)
    compare(many.ids[None], many.documents[None])
    rows = torch.stack([many.ids, many.ids.flip(0)])
    compare(rows, many.documents.expand(2, -1, -1).contiguous())


def check_bad_inputs() -> None:
    """Whatever documents and ids say, both give the same answer and nothing is read or written out of bounds."""
    generator = torch.Generator().manual_seed(0)
    for seed in range(8):
        length = 150 + seed
        ids = torch.randint(-(2**62), 2**62, (1, length), generator=generator)
        ids[:, ::3] = TAGS[torch.randint(0, 12, ids[:, ::3].shape, generator=generator)]
        documents = torch.randint(-(2**31), 2**31 - 1, (1, 5, 2), generator=generator, dtype=torch.int32)
        if seed % 2:
            documents = torch.randint(-20, length + 20, (1, 5, 2), generator=generator, dtype=torch.int32)
        compare(ids, documents)


if __name__ == "__main__":
    for check in (check_random, check_malformed, check_counts, check_extremes, check_bad_inputs):
        check()
        print(check.__name__, flush=True)
