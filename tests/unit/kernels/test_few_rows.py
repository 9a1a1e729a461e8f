"""Lists of work of few rows, made one by one, are those that arrays make."""

from __future__ import annotations

import random
from itertools import count, islice
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from megatron_multiverse.kernels.tree_decode import Work, divide_work, few, most_parts, tiles, work
from tests.unit.kernels.listed_keys import check_reads

Ints = npt.NDArray[np.int64]


def random_rows(rng: random.Random, page_size: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32], Ints]:
    """Pages, lengths and borders of at most 16 rows, the leaves of random trees; some bring several tokens."""
    fresh = count()
    rows: list[tuple[list[int], int]] = []

    def grow(prefix: list[int], depth: int) -> None:
        if depth == 0 or rng.random() < 0.3:
            own = rng.choice([1, 3, page_size, rng.randrange(1, 40 * page_size)])
            pages = [*prefix, *islice(fresh, -(-own // page_size))]
            rows.append((pages, len(prefix) * page_size + own))
            return
        shared = [*prefix, *islice(fresh, rng.choice([0, 1, 2, 1200 // page_size, rng.randrange(600)]))]
        for _ in range(rng.choice([1, 2, 3, 4, 5, 8])):
            grow(shared, depth - 1)

    for _ in range(rng.choice([1, 1, 2, 3])):
        grow([], rng.choice([0, 1, 1, 2, 3]))
    del rows[rng.choice([1, 2, 4, 5, 8, 16]) :]
    lengths = np.array([length for _, length in rows], dtype=np.int32)
    pages = np.full((len(rows), max(len(listed) for listed, _ in rows)), next(fresh), dtype=np.int32)
    for row, (listed, _) in enumerate(rows):
        pages[row, : len(listed)] = listed
    several = rng.random() < 0.5
    brought = [min(rng.choice([1, 1, 2, 5, 20]), length) if several else 1 for _, length in rows]
    return pages, lengths, np.cumsum([0, *brought])


@pytest.mark.parametrize("seed", range(6))
def test_one_by_one_and_by_arrays_come_the_same_lists(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    kinds: set[Any] = set()
    for case in range(50):
        rng = random.Random(1000 * seed + case)
        monkeypatch.undo()
        if rng.random() < 0.6:  # whatever takes less time
            least = rng.choice([1, 32, 256])
            for module in (work, tiles):
                monkeypatch.setattr(module, "LEAST_SHARED", least)
            monkeypatch.setattr(work, "AT_ONCE", 0)
            monkeypatch.setattr(tiles, "PLAIN_TIME", float("inf"))
            monkeypatch.setattr(tiles, "TIMES", rng.choice([(1, 9, 9), (9, 1, 9), (9, 9, 1)]))
            monkeypatch.setattr(tiles, "HUGE", rng.choice([64, 8192]))
        page_size, moves = rng.choice([1, 4, 16, 16, 64]), rng.random() < 0.5
        pages, lengths, borders = random_rows(rng, page_size)
        options = {
            "page_size": page_size,
            "kv_heads": rng.choice([2, 4, 8]),
            "processors": rng.choice([1, 16, 132]),
            "slots": rng.choice([most_parts(int(borders[-1])), 8, 16]),
            "sharers": rng.choice([1, 2, 4, 9, 16]),
            "moves": moves,
        }
        found: list[Work] = []
        monkeypatch.setattr(few, "FEW_TOKENS", 1 << 20)
        for most in (0, 16):
            monkeypatch.setattr(few, "FEW", most)
            found.append(divide_work(pages, lengths, borders, **options))
        for name, mine, other in zip(Work._fields, *found, strict=True):
            assert type(mine) is type(other), name
            assert np.array_equal(mine, other) if isinstance(mine, np.ndarray) else mine == other, name
            assert getattr(mine, "dtype", None) == getattr(other, "dtype", None), name
            # Kernels read numbers that lie one after the other.
            assert not isinstance(other, np.ndarray) or other.flags.c_contiguous, name
        if case % 5 == 0:
            check_reads(found[1], pages, lengths, borders, page_size)
        kinds.add((found[1].ends is None, found[1].tokens.shape[1] > 1, found[1].slots > 1, moves))
    assert len(kinds) > 8
