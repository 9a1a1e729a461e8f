"""Random packs of tagged documents as token ids, well-formed or not, with the layout that structure/ gives them."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch

from megatron_multiverse.errors import StructureError
from megatron_multiverse.structure import MAX_DEPTH, Document, Layout, StructureVocab, Tag, lay_out, pack_layouts, parse

NEWLINE, FIRST_LABEL, FIRST_WORD, VOCAB_SIZE = 20, 21, 40, 200
TAG_IDS = (7, 3, 150, 4, 11, 2, 19, 199, 0, 13, 90, 5)
VOCAB = StructureVocab(TAG_IDS, NEWLINE, {FIRST_LABEL + k: piece for k, piece in enumerate("0123456789.:")})


def random_tags(rng: random.Random, depth: int, *, width: int = 4, think: bool | None = None) -> list[Tag]:
    """The tags of one well-formed response, nested up to `depth`."""

    def block(depth: int) -> list[Tag]:
        paths = rng.randint(1, width)
        tags = [Tag.PARALLEL, Tag.GOAL, *[Tag.OUTLINE, Tag.END_OUTLINE] * paths, Tag.END_GOAL]
        for _ in range(paths):
            tags += [Tag.PATH, *blocks(depth - 1), Tag.END_PATH]
        return [*tags, Tag.CONCLUSION, Tag.END_CONCLUSION, Tag.END_PARALLEL]

    def blocks(depth: int) -> list[Tag]:
        count = rng.choice((0, 0, 1, 1, 2)) if depth > 0 else 0
        return [tag for _ in range(count) for tag in block(depth)]

    around = [[Tag.THINK], [Tag.END_THINK]] if (rng.random() < 0.5 if think is None else think) else [[], []]
    return [*blocks(min(1, depth)), *around[0], *blocks(depth), *around[1]]


def deep_tags(depth: int) -> list[Tag]:
    """One block inside the other."""
    inner: list[Tag] = []
    for _ in range(depth):
        head = [Tag.PARALLEL, Tag.GOAL, *[Tag.OUTLINE, Tag.END_OUTLINE] * 2, Tag.END_GOAL, Tag.PATH, Tag.END_PATH]
        inner = [*head, Tag.PATH, *inner, Tag.END_PATH, Tag.CONCLUSION, Tag.END_CONCLUSION, Tag.END_PARALLEL]
    return inner


def damage(rng: random.Random, tags: list[Tag]) -> list[Tag]:
    """Drop, insert, replace or swap tags; now and then the result is still (or again) well-formed."""
    tags = list(tags)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        k = rng.randrange(len(tags) + 1)
        kind = rng.choice(("drop", "insert", "replace", "swap", "cut"))
        if kind == "insert" or not tags:
            tags.insert(k, Tag(rng.randrange(12)))
        elif kind == "replace":
            tags[k % len(tags)] = Tag(rng.randrange(12))
        elif kind == "drop":
            del tags[k % len(tags)]
        elif kind == "swap":
            other = rng.randrange(len(tags))
            tags[k % len(tags)], tags[other] = tags[other], tags[k % len(tags)]
        else:
            tags = tags[:k]
    return tags


def words(rng: random.Random, most: int) -> list[int]:
    """Up to `most` ids that are neither tags nor label pieces nor newlines."""
    free = [token for token in range(FIRST_WORD, VOCAB_SIZE) if token not in TAG_IDS]
    return rng.choices(free, k=rng.randint(0, most))


def write(rng: random.Random, tags: list[Tag], *, text: int = 5) -> list[int]:
    """Ids of a response with these tags, gaps and labels as the strict parser wants them wherever tags allow it."""
    ids: list[int] = words(rng, text)
    labels: list[str] = [""]  # of the paths around
    counts: list[list[int]] = []  # outlines and paths so far of the blocks around
    for tag in tags:
        ids += [NEWLINE, TAG_IDS[tag]]
        free = tag not in (Tag.PARALLEL, Tag.GOAL, Tag.END_OUTLINE, Tag.END_GOAL, Tag.END_PATH, Tag.END_CONCLUSION)
        if tag is Tag.PARALLEL:
            counts.append([0, 0])
        elif tag is Tag.END_PARALLEL and counts:
            counts.pop()
        elif tag is Tag.END_PATH and len(labels) > 1:
            labels.pop()
        elif tag in (Tag.OUTLINE, Tag.PATH) and counts:
            counts[-1][tag is Tag.PATH] += 1
            prefix = labels[-1][:-1] + "." if labels[-1] else ""
            label = f"{prefix}{counts[-1][tag is Tag.PATH]}:"
            ids += [NEWLINE, *(FIRST_LABEL + "0123456789.:".index(piece) for piece in label)]
            if tag is Tag.PATH:
                labels.append(label)
        if free:
            ids += words(rng, text)
    return ids


@dataclass
class Pack:
    """A row of documents."""

    ids: torch.Tensor
    """int64 [s]."""
    documents: torch.Tensor
    """int32 [D, 2]."""
    layout: Layout
    malformed: list[bool]
    """Of all D rows."""


def make_pack(responses: list[tuple[list[int], list[int]]], unused: int = 0) -> Pack:
    """A row of (prompt, response) documents, judged and laid out by structure/."""
    ids: list[int] = []
    rows, layouts, malformed = [], [], []
    for prompt, response in responses:
        whole = prompt + response
        rows.append((len(ids), len(ids) + len(prompt)))
        try:
            tree = parse(whole, VOCAB, prompt_length=len(prompt))
            bad = any(depth > MAX_DEPTH for depth, _ in tree.walk())
        except StructureError:
            bad = True
        layouts.append(lay_out(Document(len(whole), len(prompt)) if bad else tree))
        malformed.append(bad)
        ids += whole
    rows += [(len(ids), len(ids))] * unused
    return Pack(
        torch.tensor(ids), torch.tensor(rows, dtype=torch.int32), pack_layouts(layouts), malformed + [False] * unused
    )


def random_pack(
    seed: int, *, documents: int = 4, depth: int = 4, width: int = 4, text: int = 5, broken: float = 0.3
) -> Pack:
    """Up to `documents` documents, a share of them damaged; prompts may hold tags; one may hold no token at all."""
    rng = random.Random(seed)
    responses = []
    for _ in range(rng.randint(1, documents)):
        prompt = words(rng, 6) + rng.choices(TAG_IDS, k=rng.choice((0, 0, 3))) + words(rng, 3)
        tags = random_tags(rng, depth, width=width)
        if rng.random() < broken:
            tags = damage(rng, tags)
        response = write(rng, tags, text=text)
        responses.append(rng.choice([(prompt, response)] * 6 + [([], response), (prompt, []), ([], [])]))
    if not any(map(len, responses[-1])):
        responses.append(([*words(rng, 3), FIRST_WORD], []))
    return make_pack(responses, unused=rng.randint(0, 2))
