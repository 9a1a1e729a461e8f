"""Which rows share a tile."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_multiverse.kernels.tree_decode import divide_work, most_parts, tiles
from tests.unit.kernels.listed_keys import check_reads


@pytest.mark.parametrize("levels", [[0, 512], [0, 16, 256, 512]])
def test_groups_of_one_level_are_made_into_the_tiles_that_the_general_way_finds(levels, monkeypatch):
    compared = 0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        common = rng.choice(levels, int(rng.integers(1, 40)))
        lengths = (512 + rng.integers(1, 3000, len(common) + 1)).astype(np.int32)
        for sharers in (9, 8, 2):
            monkeypatch.setattr(tiles, "FEW_ROWS", 0)
            compared += tiles._flat_groups(common, 256) is not None
            got = tiles.choose_tiles(common.tolist(), lengths, sharers, None)
            monkeypatch.setattr(tiles, "FEW_ROWS", 64)
            want = tiles.choose_tiles(common.tolist(), lengths, sharers, None)
            assert (got is None) == (want is None)
            if got is not None and want is not None:
                assert all(np.array_equal(mine, other) for mine, other in zip(got, want, strict=True))
    assert compared > 5


def test_rows_part_where_that_reads_less():
    """Nine rows share 300 keys, three at a time 4,096; alone they have 100 more."""
    common = np.array([4096, 4096, 304, 4096, 4096, 304, 4096, 4096])
    found = tiles.choose_tiles(common.tolist(), np.full(9, 4196, dtype=np.int32), 9, None)
    assert found is not None and found.sharers == 4
    assert [x.tolist() for x in found[:3]] == [[0, 3, 6], [3, 6, 9], [4096] * 3]
    common[[0, 1, 3, 4, 6, 7]] = 320
    found = tiles.choose_tiles(common.tolist(), np.full(9, 420, dtype=np.int32), 9, 256)
    assert found is not None and found.shared.tolist() == [304]


@pytest.mark.parametrize("tokens_per_row", [1, 2])
def test_hundreds_of_rows_may_each_share_more_with_the_next(tokens_per_row):
    """Prompts that end at every page of one text, as of someone who scores all its beginnings."""
    rows = 512
    own = np.arange(rows)[:, None] < np.arange(rows) - 17
    pages = np.where(own, 10_000 + np.arange(rows * rows).reshape(rows, rows), np.arange(rows)).astype(np.int32)
    pages = np.concatenate((pages, 500_000 + np.arange(rows * 20).reshape(rows, 20)), 1, dtype=np.int32)
    lengths = (16 * 18 + 5 + 16 * np.arange(rows)).astype(np.int32)
    borders = tokens_per_row * np.arange(rows + 1)
    work = divide_work(
        pages, lengths, borders, page_size=16, kv_heads=4, processors=132, slots=most_parts(int(borders[-1])), sharers=9
    )
    assert work.tokens.shape[1] > 1
    check_reads(work, pages, lengths, borders)
