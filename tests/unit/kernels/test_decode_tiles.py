"""Which rows share a tile."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_multiverse.kernels.tree_decode import tiles


@pytest.mark.parametrize("levels", [[0, 512], [0, 16, 256, 512]])
def test_groups_of_one_level_are_made_into_the_tiles_that_the_general_way_finds(levels, monkeypatch):
    compared = 0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        common = rng.choice(levels, int(rng.integers(1, 40)))
        lengths = (512 + rng.integers(1, 3000, len(common) + 1)).astype(np.int32)
        for sharers in (9, 8, 2):
            monkeypatch.undo()
            compared += tiles._flat_groups(common, 256) is not None
            got = tiles.choose_tiles(common, lengths, sharers, None)
            monkeypatch.setattr(tiles, "_flat_groups", lambda *args: None)
            want = tiles.choose_tiles(common, lengths, sharers, None)
            assert (got is None) == (want is None)
            if got is not None and want is not None:
                assert all(np.array_equal(mine, other) for mine, other in zip(got, want, strict=True))
    assert compared > 5


def test_rows_part_where_that_reads_less():
    """Nine rows share 300 keys, three at a time 4,096; alone they have 100 more."""
    common = np.array([4096, 4096, 304, 4096, 4096, 304, 4096, 4096])
    found = tiles.choose_tiles(common, np.full(9, 4196, dtype=np.int32), 9, None)
    assert found is not None and found.sharers == 4
    assert [x.tolist() for x in found[:3]] == [[0, 3, 6], [3, 6, 9], [4096] * 3]
    common[[0, 1, 3, 4, 6, 7]] = 320
    found = tiles.choose_tiles(common, np.full(9, 420, dtype=np.int32), 9, 256)
    assert found is not None and found.shared.tolist() == [304]
