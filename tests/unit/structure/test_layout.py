"""The layout rule against 50 documents and packs worked out by an independent program."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_multiverse.structure import (
    TAGS,
    Layout,
    StructureVocab,
    lay_out,
    pack_layouts,
    parse,
    visible_matrix,
)

CASES = json.loads((Path(__file__).parents[2] / "golden" / "layout_cases.json").read_text())


def case_layouts(case: dict[str, Any]) -> Layout:
    pieces = sorted(set(case["tokens"]) | set(TAGS) | {"\n"})
    vocab = StructureVocab.from_pieces(pieces)
    ids = [pieces.index(token) for token in case["tokens"]]
    borders = [*case["document_starts"], len(ids)]
    parts = [
        lay_out(parse(ids[start:end], vocab, prompt_length=prompt))
        for start, end, prompt in zip(borders, borders[1:], case["prompt_lengths"], strict=False)
    ]
    return pack_layouts(parts)


@pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))
def test_layout_equals_golden_case(case: dict[str, Any]) -> None:
    layout = case_layouts(case)
    n = len(case["tokens"])
    hidden = np.zeros((n, n), dtype=bool)
    for query, ranges in enumerate(case["hidden_key_ranges"]):
        for start, end in ranges:
            hidden[query, start:end] = True
    documents = np.searchsorted(case["document_starts"], np.arange(n), side="right")
    expected = np.tril(~hidden) & (documents[:, None] == documents[None, :])
    assert layout.position_ids.tolist() == case["position_ids"]
    assert np.array_equal(visible_matrix(layout), expected)
    assert layout.num_visible_pairs == expected.sum()
    assert layout.loss_mask().astype(int).tolist() == case["loss_mask"]
    assert layout.loss_mask(train_forced_tokens=True).astype(int).tolist() == case["loss_mask_with_forced"]
