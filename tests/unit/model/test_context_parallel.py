"""The split of tokens over context parallel ranks: complete, and balanced under every mask."""

from __future__ import annotations

import pytest
import torch

from benchmarks.kernels.cases import make_labels, make_r
from benchmarks.training_balance import over_mean, visible_keys, zig_zag
from megatron_multiverse.kernels.multiverse_attention.tiles import (
    FULL,
    PARTIAL,
    TILE,
    tile_bounds_reference,
    tile_classes,
)
from megatron_multiverse.model.context_parallel import PARTIAL_COST, chunk_work, split_by_area

LENGTH = 8192


@pytest.mark.parametrize("case", ["wide", "deep"])
def test_every_rank_has_the_same_work(case: str) -> None:
    """The rank with most is within 3 % of the mean, and nearer to it than with the zig-zag split of other packages.
    Each rank has its chunks from the heaviest on."""
    r, pairs = make_labels(case, LENGTH)
    assert visible_keys(r).sum() == pairs
    work = chunk_work(r, TILE)[0]

    def most(places: torch.Tensor) -> float:
        return over_mean(work[places.view(places.shape[1], -1, TILE)[..., 0] // TILE].sum(1).tolist())

    for ranks in (2, 4):
        places = split_by_area(r, ranks)
        assert torch.equal(places.flatten().sort().values, torch.arange(LENGTH))
        chunks = places.view(ranks, -1, TILE)
        assert (chunks.diff(dim=2) == 1).all() and (work[chunks[..., 0] // TILE].diff(dim=1) <= 0).all()
        ours, theirs = most(places), most(zig_zag(r, ranks))
        assert ours < 1.03 and theirs > ours


def test_partly_visible_tiles_weigh_more() -> None:
    r = make_r("packed", 16384)
    classes = tile_classes(tile_bounds_reference(r), tile_bounds_reference(r))[0]
    for number, work in enumerate(chunk_work(r, TILE)[0].tolist()):
        row = classes[number].tolist()
        assert work == sum({FULL: 1, PARTIAL: PARTIAL_COST}.get(kind, 0) for kind in row)


def test_rows_are_split_by_themselves_and_odd_lengths_in_small_chunks() -> None:
    r = torch.cat([make_r(case, 4224) for case in ("wide", "causal")])
    places = split_by_area(r, 3)
    assert places.shape == (2, 3, 1408)
    for row, own in zip(places, r, strict=True):
        assert torch.equal(row, split_by_area(own[None], 3)[0])
        assert torch.equal(row.flatten().sort().values, torch.arange(4224))
