"""A batch of responses measured at once agrees with the parser, one response at a time."""

from __future__ import annotations

import random

import numpy as np
import pytest

from megatron_multiverse.errors import StructureError
from megatron_multiverse.structure import (
    MAX_DEPTH,
    BatchMeter,
    BatchStatistics,
    Statistics,
    StructureVocab,
    Tag,
    measure,
    parse,
)
from tests.random_tags import (
    FIRST_LABEL,
    FIRST_WORD,
    NEWLINE,
    TAG_IDS,
    VOCAB,
    VOCAB_SIZE,
    damage,
    deep_tags,
    random_tags,
    write,
)

# Tokens that hold several characters of a label, as real vocabularies have them; the first id is VOCAB_SIZE.
LONG_PIECES = ["1:", "2:", "12", "10", ".1", "1.", "2.1", "11:", ".2:", "1.1.1"]
LONG_VOCAB = StructureVocab(
    TAG_IDS, NEWLINE, {**VOCAB.label_pieces, **{VOCAB_SIZE + k: piece for k, piece in enumerate(LONG_PIECES)}}
)
COUNTS = tuple(Statistics.__dataclass_fields__)


def _join_pieces(rng: random.Random, ids: list[int]) -> list[int]:
    """The same text in longer pieces of labels, here and there."""
    id_of = {piece: token for token, piece in LONG_VOCAB.label_pieces.items()}
    joined: list[int] = []
    for token in ids:
        both = LONG_VOCAB.label_pieces.get(joined[-1], "?") if joined else "?"
        both += LONG_VOCAB.label_pieces.get(token, "?")
        if both in id_of and rng.random() < 0.7:
            joined[-1] = id_of[both]
        else:
            joined.append(token)
    return joined


def _spoil(rng: random.Random, ids: list[int]) -> list[int]:
    """Put in, replace or take out one token."""
    if not ids:
        return ids
    k = rng.randrange(len(ids))
    new = rng.choice(([], [NEWLINE], [FIRST_WORD], [FIRST_LABEL + rng.randrange(12)], [rng.choice(TAG_IDS)]))
    return [*ids[:k], *new, *ids[k + rng.randint(0, 1) :]]


def _response(rng: random.Random) -> list[int]:
    depth = rng.randint(0, 4)
    # Wide blocks have labels of two digits, deep ones labels of many.
    tags = random_tags(rng, depth, width=rng.choice((2, 4, 12)) if depth < 3 else 2)
    if rng.random() < 0.1:
        tags = deep_tags(rng.randint(5, 10))
    if rng.random() < 0.3:
        tags = damage(rng, tags)
    ids = _join_pieces(rng, write(rng, tags))
    return _spoil(rng, ids) if rng.random() < 0.3 else ids


def _measure(responses: list[list[int]], **options: int) -> BatchStatistics:
    ids = np.array([token for response in responses for token in response], dtype=np.uint32)
    return BatchMeter(LONG_VOCAB, **options).measure(
        ids, np.array([len(response) for response in responses], dtype=int)
    )


def _counts(batch: BatchStatistics, k: int) -> Statistics:
    return Statistics(**{name: int(getattr(batch, name)[k]) for name in COUNTS})


def _one_by_one(response: list[int], max_depth: int = MAX_DEPTH) -> Statistics | None:
    try:
        return measure(parse(response, LONG_VOCAB, max_depth=max_depth))
    except StructureError:
        return None


@pytest.mark.parametrize("seed", range(60))
def test_random_batches_agree_with_the_parser(seed: int) -> None:
    rng = random.Random(seed)
    responses = [_response(rng) for _ in range(rng.randint(0, 16))]
    batch = _measure(responses)
    for k, response in enumerate(responses):
        expected = _one_by_one(response)
        assert bool(batch.is_valid[k]) == (expected is not None), k
        assert expected is None or _counts(batch, k) == expected, k


def test_the_random_batches_hold_both_kinds() -> None:
    rng = random.Random(0)
    results = [_one_by_one(_response(rng)) for _ in range(200)]
    valid = [result for result in results if result is not None]
    assert 50 < len(valid) < 150
    assert max(result.depth for result in valid) == MAX_DEPTH
    assert max(result.paths for result in valid) > 12


@pytest.mark.parametrize("max_depth", [1, 2, 8])
def test_deeper_blocks_are_not_valid(max_depth: int) -> None:
    responses = [write(random.Random(depth), deep_tags(depth)) for depth in range(1, 10)]
    batch = _measure(responses, max_depth=max_depth)
    assert batch.is_valid.tolist() == [depth <= max_depth for depth in range(1, 10)]
    assert batch.depth[:max_depth].tolist() == list(range(1, max_depth + 1))


def test_ids_beyond_all_tags_and_labels_are_text() -> None:
    response = write(random.Random(1), deep_tags(2))
    response.insert(response.index(TAG_IDS[Tag.CONCLUSION]) + 1, 4_000_000_000)
    assert _counts(_measure([response]), 0) == _one_by_one(response)


def test_labels_too_long_to_compare_are_left_to_the_parser() -> None:
    """Those of a sixth block inside the hundredth path of a fifth, and so on outwards: 23 characters."""
    tags: list[Tag] = []
    for _ in range(6):
        head = [Tag.PARALLEL, Tag.GOAL, *[Tag.OUTLINE, Tag.END_OUTLINE] * 100, Tag.END_GOAL]
        paths = [*[Tag.PATH, Tag.END_PATH] * 99, Tag.PATH, *tags, Tag.END_PATH]
        tags = [*head, *paths, Tag.CONCLUSION, Tag.END_CONCLUSION, Tag.END_PARALLEL]
    response = write(random.Random(0), tags)
    assert _one_by_one(response) is not None
    assert _measure([response]).is_valid.tolist() == [False]


def test_no_response_at_all() -> None:
    assert _measure([]).is_valid.tolist() == []
    batch = _measure([[], [FIRST_WORD], []])
    assert batch.is_valid.tolist() == [True] * 3
    assert batch.critical_tokens.tolist() == [0, 1, 0]
