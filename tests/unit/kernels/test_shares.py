"""Lists of work whose programs have equal shares of the keys of all rows."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_multiverse.inference.step.graph_sizes import SIZES, room_for_items
from megatron_multiverse.kernels.tree_decode import SuccessiveWork, Work, divide_work, most_cut, most_parts
from megatron_multiverse.kernels.tree_decode.pieces import BLOCK
from tests.unit.kernels.listed_keys import check_reads


def rows_alone(lengths: np.ndarray, page_size: int = 16) -> np.ndarray:
    """Pages of rows that share nothing."""
    width = -(-int(lengths.max()) // page_size) + BLOCK
    return np.arange(len(lengths) * width, dtype=np.int32).reshape(len(lengths), width)


def divided(lengths: np.ndarray, kv_heads: int = 4, **options: bool) -> Work:
    rows = np.arange(len(lengths) + 1)
    return divide_work(
        rows_alone(lengths), lengths, rows, page_size=16, kv_heads=kv_heads, processors=132,
        slots=most_parts(len(lengths)), sharers=9, **options,
    )  # fmt: skip


@pytest.mark.parametrize("kv_heads", [1, 2, 4, 8])
@pytest.mark.parametrize("seed", range(10))
def test_every_program_has_as_many_keys_as_any_other(seed, kv_heads):
    rng = np.random.default_rng(seed)
    rows = min(int(rng.integers(110, 1200)) // kv_heads, SIZES[-1])
    lengths = np.exp(rng.uniform(1, 9, rows)).astype(np.int32)
    work, programs = divided(lengths, kv_heads, shares=True), most_cut(132, kv_heads)
    assert len(work.shares) == programs + 1 and work.shares[0] == 0 and work.shares[-1] == len(work.items)
    check_reads(work, rows_alone(lengths), lengths, np.arange(len(lengths) + 1))
    blocks = -(-(work.items[:, 2] - work.items[:, 1]) // BLOCK)
    of_programs = np.diff(np.concatenate(([0], np.cumsum(blocks)))[work.shares])
    for_parts = -(-int(np.ceil(lengths.max() / BLOCK)) // (work.slots - 1))  # a row has no more parts than slots
    assert of_programs.max() <= max(-(-int(blocks.sum()) // programs), for_parts)
    assert len(work.items) <= room_for_items(work, next(size for size in SIZES if size >= len(lengths)), 132, kv_heads)


def test_rows_of_about_one_length_have_an_item_a_program_each():
    even, uneven = np.full(64, 1083, dtype=np.int32), np.linspace(100, 2000, 64).astype(np.int32)
    assert len(divided(even, shares=True).shares) == 0 < len(divided(uneven, shares=True).shares)
    assert len(divided(uneven).shares) == 0, "where a graph has no place for shares"
    assert len(divided(4 * uneven[::4], shares=True).shares) > 0
    assert len(divided(uneven[::4], shares=True).shares) == 0, "a program has too few keys"
    assert len(divided(64 * uneven[::8], shares=True).shares) == 0, "few rows are cut into items of one size"


def test_a_list_of_shares_is_moved_on_until_it_is_made_anew():
    lengths = np.linspace(100, 2000, 40).astype(np.int32)
    pages, borders = rows_alone(lengths + BLOCK), np.arange(41)
    divider = SuccessiveWork(page_size=16, kv_heads=4, processors=132, sharers=9)
    made = set()
    for _ in range(2 * BLOCK):
        work = divider.divide(pages, lengths, borders, most_parts(48))
        check_reads(work, pages, lengths, borders)
        assert len(work.shares) == 67 and divider.moves is not None and divider.moves.at_end.sum() == 40
        made.add(id(work.shares))
        lengths = lengths + np.int32(1)
    assert len(made) == 2
