"""The split of tokens over context parallel ranks: complete, and balanced under every mask."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from benchmarks.kernels.cases import TAG_IDS, make_ids
from megatron_multiverse.kernels.structure_scan import structure_scan_reference
from megatron_multiverse.model.context_parallel import split_by_area

LENGTH = 8192


def visible_keys(r: Tensor) -> Tensor:
    """How many keys each token of r [1, s] sees."""
    places = torch.arange(r.shape[1])
    rows = [(r[0, q, None] >= r[0]) & (q[:, None] >= places) for q in places.split(1024)]
    return torch.cat([row.sum(1) for row in rows]).double()


def zig_zag(length: int, ranks: int) -> Tensor:
    """Two stretches for each rank, one from the front and one from the back: even under a causal mask."""
    parts = torch.arange(length).view(1, 2 * ranks, -1)
    return torch.stack([torch.cat([parts[:, k], parts[:, 2 * ranks - 1 - k]], dim=1) for k in range(ranks)], dim=1)


def labels(case: str, length: int) -> Tensor:
    """r [1, length] of a benchmark's case."""
    r: Tensor = structure_scan_reference(*make_ids(case, length), torch.tensor(TAG_IDS)).r
    return r


@pytest.mark.parametrize("case", ["wide", "deep"])
def test_every_rank_has_the_same_area(case: str) -> None:
    """The slowest rank is within 5 % of the mean, and faster than with the zig-zag split of other packages."""
    r = labels(case, LENGTH)
    seen = visible_keys(r)
    for ranks in (2, 4):
        places = split_by_area(r, ranks)
        assert torch.equal(places.flatten().sort().values, torch.arange(LENGTH))
        assert (places.diff(dim=2) > 0).all()
        areas, theirs = (seen[split[0]].sum(1) for split in (places, zig_zag(LENGTH, ranks)))
        assert areas.max() < 1.05 * areas.mean()
        assert theirs.max() > areas.max()


def test_rows_are_split_by_themselves_and_odd_lengths_in_small_chunks() -> None:
    r = torch.cat([labels(case, 4224) for case in ("wide", "causal")])
    places = split_by_area(r, 3)
    assert places.shape == (2, 3, 1408)
    for row, own in zip(places, r, strict=True):
        assert torch.equal(row, split_by_area(own[None], 3)[0])
        assert torch.equal(row.flatten().sort().values, torch.arange(4224))
