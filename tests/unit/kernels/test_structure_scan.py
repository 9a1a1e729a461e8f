"""The scan: its reference against structure/, its kernels against the reference in test_interpreted.py."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from random_tags import (
    TAG_IDS,
    VOCAB,
    Pack,
    damage,
    deep_tags,
    make_pack,
    random_pack,
    random_tags,
    words,
    write,
)

from benchmarks.kernels.cases import CASES, make_ids
from benchmarks.kernels.cases import TAG_IDS as BENCHMARK_TAGS
from megatron_multiverse.kernels.structure_scan import (
    StructureScan,
    narrow,
    structure_scan,
    structure_scan_reference,
)
from megatron_multiverse.structure import MAX_DEPTH, TAGS, StructureVocab, lay_out, pack_layouts, parse

TAG_TENSOR = torch.tensor(TAG_IDS)
GOLDEN = json.loads((Path(__file__).parents[2] / "golden" / "layout_cases.json").read_text())


def scan_pack(pack: Pack) -> StructureScan:
    return structure_scan_reference(pack.ids[None], pack.documents[None], TAG_TENSOR)


def assert_is_layout(scan: StructureScan, pack: Pack) -> None:
    assert scan.malformed[0].tolist() == pack.malformed
    assert torch.equal(scan.position_ids[0], torch.from_numpy(pack.layout.position_ids))
    assert torch.equal(scan.r[0], torch.from_numpy(pack.layout.r))


@pytest.mark.parametrize("case", GOLDEN, ids=range(len(GOLDEN)))
def test_reference_equals_the_golden_cases(case: dict) -> None:
    pieces = sorted(set(case["tokens"]) | set(TAGS) | {"\n"})
    vocab = StructureVocab.from_pieces(pieces)
    ids = [pieces.index(token) for token in case["tokens"]]
    starts = case["document_starts"]
    borders = [*starts, len(ids)]
    parts = [
        lay_out(parse(ids[start:end], vocab, prompt_length=prompt))
        for start, end, prompt in zip(borders, borders[1:], case["prompt_lengths"], strict=False)
    ]
    documents = [[start, start + prompt] for start, prompt in zip(starts, case["prompt_lengths"], strict=True)]
    scan = structure_scan(torch.tensor([ids]), torch.tensor([documents]), torch.tensor(vocab.tag_ids))
    assert scan.position_ids[0].tolist() == case["position_ids"]
    assert np.array_equal(scan.r[0].numpy(), pack_layouts(parts).r)
    assert not scan.malformed.any()


def test_reference_equals_structure_on_random_packs() -> None:
    judged = []
    for seed in range(150):
        pack = random_pack(seed, depth=1 + seed % 4)
        assert_is_layout(scan_pack(pack), pack)
        judged += pack.malformed
    assert 50 < sum(judged) < len(judged) - 50  # both verdicts are tested


def test_reference_agrees_with_the_strict_parser_about_damaged_tags() -> None:
    """A single tag dropped, moved, swapped or inserted: the verdict is the parser's, and neighbours do not notice."""
    judged = []
    for seed in range(300):
        rng = random.Random(seed)
        sound = [(words(rng, 4), write(rng, random_tags(rng, 2, width=2))) for _ in range(2)]
        tags = damage(rng, random_tags(rng, 3, width=3))
        damaged = make_pack([sound[0], (words(rng, 4), write(rng, tags)), sound[1]])
        assert_is_layout(scan_pack(damaged), damaged)
        assert not damaged.malformed[0] and not damaged.malformed[2]
        judged.append(damaged.malformed[1])
    assert 100 < sum(judged) < 300


@pytest.mark.parametrize("depth", [MAX_DEPTH, MAX_DEPTH + 1])
def test_nesting_deeper_than_allowed_is_causal_and_flagged(depth: int) -> None:
    pack = make_pack([([], write(random.Random(0), deep_tags(depth)))])
    scan = scan_pack(pack)
    assert_is_layout(scan, pack)
    assert bool(scan.malformed.any()) == (depth > MAX_DEPTH)
    assert (scan.position_ids[0].tolist() == list(range(len(pack.ids)))) == (depth > MAX_DEPTH)


def test_a_difference_between_scans_is_named() -> None:
    """Entries of a list after its count make none."""
    pack = random_pack(2, depth=3)
    scan, other = scan_pack(pack), scan_pack(pack)
    other.lists.q_full.indices.masked_fill_(other.lists.q_full.valid() < 0, 99)
    assert scan.difference(other) is None
    other.lists.k_partial.indices[0, 0, 0, 0] += 1
    assert scan.difference(other) == "k_partial.indices"
    other.lists.q_partial.counts[0, 0, 0] += 1
    assert scan.difference(other) == "q_partial.counts"
    other.position_ids[0, 0] += 1
    assert scan.difference(other) == "position_ids"
    assert scan.difference(dataclasses.replace(scan, r=scan.r.long())) == "r"


def test_labels_of_a_row_are_ranks() -> None:
    pack = random_pack(2, depth=3)
    assert sorted(scan_pack(pack).r[0].tolist()) == list(range(len(pack.ids)))


def test_gaps_and_labels_do_not_change_the_layout() -> None:
    """The strict parser refuses these ids, the scan reads their tags."""
    ids = [TAG_IDS[tag] for tag in deep_tags(2)]
    scan = structure_scan(torch.tensor([ids]), torch.tensor([[[0, 0]]]), TAG_TENSOR)
    assert not scan.malformed.any()
    assert VOCAB.newline_id not in ids


def test_documents_are_read_as_sorted_and_inside() -> None:
    """Starts count as the largest so far within [0, s], the first as 0; responses lie inside their document."""
    ids = torch.tensor([write(random.Random(1), deep_tags(1))])
    s = ids.shape[1]
    clean = structure_scan(ids, torch.tensor([[[0, 0], [10, 12], [10, 10], [s, s]]]), TAG_TENSOR)
    wild = structure_scan(ids, torch.tensor([[[4, -7], [10, 12], [3, 2], [s + 9, -(2**30)]]]), TAG_TENSOR)
    for name in ("position_ids", "r", "malformed"):
        assert torch.equal(getattr(clean, name), getattr(wild, name)), name


def test_wide_integers_mean_the_same_as_int32() -> None:
    """Starts and responses beyond int32 are clamped, not cut: 2**32 + 3 is not 3."""
    ids = torch.tensor([write(random.Random(1), deep_tags(1))])
    s = ids.shape[1]
    wild = torch.tensor([[[-(2**40), 2**32 + 3], [10, 2**33], [2**32 + 5, -(2**34)]]])
    assert narrow(wild, s).tolist() == [[[0, s], [10, s], [s, 0]]] and narrow(wild, s).dtype == torch.int32
    assert narrow(wild[:, :, :1].int(), s).dtype == torch.int32
    for name in ("position_ids", "r", "malformed"):
        want = getattr(structure_scan(ids, wild, TAG_TENSOR), name)
        assert torch.equal(getattr(structure_scan(ids, narrow(wild, s), TAG_TENSOR), name), want), name


@pytest.mark.parametrize(
    ("ids", "documents", "tags", "message"),
    [
        (torch.zeros(5), torch.zeros(1, 1, 2), TAG_TENSOR, "ids must be"),
        (torch.zeros(1, 5, dtype=torch.int64), torch.zeros(1, 1, 2), TAG_TENSOR, "documents must be an int32"),
        (torch.zeros(1, 0, dtype=torch.int64), torch.zeros(1, 1, 2, dtype=torch.int32), TAG_TENSOR, "1 to"),
        (torch.zeros(2, 5, dtype=torch.int64), torch.zeros(1, 1, 2, dtype=torch.int32), TAG_TENSOR, "like ids"),
        (torch.zeros(1, 5, dtype=torch.int64), torch.zeros(1, 1, 2, dtype=torch.int32), TAG_TENSOR[:3], "12 ids"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(
    ids: torch.Tensor, documents: torch.Tensor, tags: torch.Tensor, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        structure_scan(ids, documents, tags)


@pytest.mark.parametrize("name", CASES)
def test_benchmark_ids_are_well_formed_and_fill_the_row(name: str) -> None:
    ids, documents = make_ids(name, 8192, rows=8)
    scan = structure_scan(ids, documents, torch.tensor(BENCHMARK_TAGS))
    assert ids.shape == (1, 8192) and not scan.malformed.any()
    assert (scan.position_ids[0].tolist() == list(range(8192))) == (name == "causal")
    assert documents[0, 0].tolist() == [0, 0] and documents[0, -1].tolist() == [8192, 8192]
