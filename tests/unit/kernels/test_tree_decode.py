"""tree_decode and kv_copy against the formulas of their READMEs, written as loops."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks.kernels.tree_decode import Case, tables
from megatron_multiverse.inference.step.graph_sizes import SIZES, room_for_items
from megatron_multiverse.kernels.kv_copy import copy_slots
from megatron_multiverse.kernels.tree_decode import (
    SuccessiveWork,
    divide_work,
    group_rows,
    most_parts,
    most_sharers,
    reference,
    tree_decode,
    with_sharers,
)
from megatron_multiverse.kernels.tree_decode.pieces import stay_whole
from tests.unit.kernels.listed_keys import check_reads

PAGE = 4


def by_loops(query, keys, values, pages, lengths, borders, scale):
    out = torch.zeros_like(query)
    group = query.shape[1] // keys.shape[2]
    for row, (start, end) in enumerate(zip(borders[:-1].tolist(), borders[1:].tolist(), strict=True)):
        for i in range(start, end):
            seen = range(int(lengths[row]) - (end - 1 - i))
            places = [(int(pages[row, k // PAGE]), k % PAGE) for k in seen]
            for h in range(query.shape[1]):
                row_keys = torch.stack([keys[page, slot, h // group] for page, slot in places])
                row_values = torch.stack([values[page, slot, h // group] for page, slot in places])
                out[i, h] = ((row_keys @ query[i, h]) * scale).softmax(0) @ row_values
    return out


def make_case(counts, lengths, *, heads=4, kv_heads=2, seed=0):
    """Random pages and queries; what no row sees holds NaN."""
    generator = torch.Generator().manual_seed(seed)
    widest = -(-max(lengths) // PAGE)
    keys, values = (torch.randn(30, PAGE, kv_heads, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    pages = torch.stack([torch.randperm(30, generator=generator)[:widest] for _ in counts]).int()
    pages[:, 0] = pages[0, 0]  # rows share pages
    query = torch.randn(sum(counts), heads, 8, generator=generator, dtype=torch.float64)
    borders = torch.tensor([0, *counts]).cumsum(0)
    seen = torch.zeros(30, PAGE, dtype=torch.bool)
    for row, length in enumerate(lengths):
        for k in range(length):
            seen[pages[row, k // PAGE], k % PAGE] = True
    keys[~seen], values[~seen] = float("nan"), float("nan")
    return query, keys, values, pages, torch.tensor(lengths, dtype=torch.int32), borders


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (8, 1)])
@pytest.mark.parametrize("counts", [[1, 1, 1], [5, 5, 5], [1, 7, 3], [9]])
@pytest.mark.parametrize("padding", [0, 512])
def test_equals_the_formula(heads, kv_heads, counts, padding, monkeypatch):
    monkeypatch.setattr(reference, "MOST_PADDING", padding)
    lengths = [20, 7, 11][: len(counts)]
    case = make_case(counts, lengths, heads=heads, kv_heads=kv_heads)
    got = tree_decode(*case, 0.3)
    torch.testing.assert_close(got, by_loops(*case, 0.3), atol=1e-12, rtol=0)
    groups = group_rows(*(x.numpy() for x in case[3:]), PAGE, kv_heads)
    assert torch.equal(tree_decode(*case, 0.3, groups=groups), got)


def test_rows_share_a_rectangle_while_little_is_padded():
    def rectangles(counts, lengths):
        pages, borders = np.zeros((len(counts), 300), dtype=np.int32), np.cumsum([0, *counts])
        groups = group_rows(pages, np.array(lengths, dtype=np.int32), borders, 16, 2)
        return [(len(group.places), group.q, group.places.shape[2]) for group in groups]

    assert rectangles([1, 1, 1], [400, 200, 300]) == [(3, 1, 400)]
    assert rectangles([1, 1, 1], [900, 300, 890]) == [(2, 1, 900), (1, 1, 300)]
    assert rectangles([1] * 9, [1024] * 9) == [(4, 1, 1024), (4, 1, 1024), (1, 1, 1024)]
    assert rectangles([1, 1], [4800, 4800]) == [(1, 1, 4800), (1, 1, 4800)]
    assert rectangles([1, 8, 5], [8, 8, 8]) == [(1, 1, 8), (2, 8, 8)]


@pytest.mark.parametrize(("heads", "sharers", "reads"), [(28, 9, 5), (32, 8, 6), (20, 12, 4), (4, 16, 3), (64, 8, 6)])
def test_a_fork_reads_the_prefix_once_for_as_many_queries_as_fill_a_tile(heads, sharers, reads):
    """Eight branches with five forced tokens each, and `</Goal>`: 41 queries over a prefix of 1,024 pages."""
    pages = np.concatenate((np.tile(np.arange(1024), (9, 1)), 1024 + np.arange(9)[:, None]), 1).astype(np.int32)
    lengths, borders = np.full(9, 16 * 1024 + 7, dtype=np.int32), np.cumsum([0, 1] + [5] * 8)
    assert most_sharers(heads, 4) == sharers
    work = divide_work(pages, lengths, borders, page_size=16, kv_heads=4, processors=132, slots=16, sharers=sharers)
    start, end = work.items[:, 1], work.items[:, 2]
    assert np.minimum(end, 16 * 1024).clip(start).sum() - start.sum() == reads * 16 * 1024
    assert (np.bincount(work.tokens[work.tokens >= 0], minlength=41) == work.counts).all()
    assert len(work.pages) == 1024 + 9, "shared pages are listed once"


@pytest.mark.parametrize(
    ("rows", "prefix", "together"),
    [
        (1, 32768, 1),
        (8, 0, 1),
        (8, 512, 1),
        (8, 1024, 1),
        (2, 2048, 2),
        (16, 1024, 4),
        (2, 8192, 2),
        (8, 2048, 9),
        (4, 8192, 4),
        (64, 32768, 9),
    ],
)
def test_rows_read_shared_keys_together_where_that_is_faster(rows, prefix, together):
    """As measured on an H200, see `tiles.TIMES`; each row has 256 keys of its own."""
    pages = np.tile(np.arange((prefix + 256) // 16, dtype=np.int32), (rows, 1))
    pages[:, prefix // 16 :] += np.arange(rows, dtype=np.int32)[:, None] * 10_000
    lengths, borders = np.full(rows, prefix + 256, dtype=np.int32), np.arange(rows + 1)
    work = divide_work(
        pages, lengths, borders, page_size=16, kv_heads=4, processors=132, slots=most_parts(rows), sharers=9
    )
    assert work.tokens.shape[1] == together


@pytest.mark.parametrize(
    ("requests", "paths", "own", "together"),
    [(8, 3, 16, 4), (8, 3, 144, 4), (8, 5, 64, 9), (4, 2, 64, 2), (32, 3, 160, 4), (32, 5, 64, 9), (24, 1, 64, 1)],
)
def test_paths_of_several_requests_share_where_that_is_faster_and_read_every_key_once(requests, paths, own, together):
    """24 rows of 8 requests were slower each for itself (Qwen2.5-7B: 1.24 s for their answers instead of 1.18)."""
    pages, lengths, num_pages = tables(Case(requests, paths, 1024, own), 16)
    rows, borders = len(lengths), np.arange(len(lengths) + 1)
    assert rows == requests * paths and num_pages == len(np.unique(pages)) == (1024 * requests + own * rows) // 16
    work = divide_work(
        pages, lengths, borders, page_size=16, kv_heads=4, processors=132, slots=most_parts(rows), sharers=9
    )
    assert work.tokens.shape[1] == together
    check_reads(work, pages, lengths, borders)


@pytest.mark.parametrize(
    ("rows", "keys", "items"),
    [(8, 16384, 64), (24, 1083, 48), (25, 8192, 25), (32, 1083, 32), (33, 8192, 66), (34, 8192, 34), (96, 8192, 96)],
)
def test_rows_alone_are_cut_for_as_many_programs_as_run_at_once(rows, keys, items):
    pages, lengths = np.arange(rows * 1024, dtype=np.int32).reshape(rows, 1024), np.full(rows, keys, dtype=np.int32)
    borders, slots = np.arange(rows + 1), most_parts(rows)
    work = divide_work(pages, lengths, borders, page_size=16, kv_heads=4, processors=132, slots=slots, sharers=9)
    assert len(work.items) == items and (work.slots == 1) == (items == rows)
    check_reads(work, pages, lengths, borders)


@pytest.mark.parametrize("kv_heads", [1, 2, 4, 8])
def test_rows_are_left_whole_where_their_graph_has_the_tiles_for_it(kv_heads):
    """A graph's tiles are chosen by its size, the list by the rows of the step."""
    for rows in range(1, 193):
        size = next(size for size in SIZES if size >= rows)
        assert stay_whole(rows * kv_heads, 132) == stay_whole(size * kv_heads, 132), (rows, size)


@pytest.mark.parametrize("seed", range(20))
def test_a_graph_has_hardly_more_room_than_rows_alone_have_items(seed):
    """Padding beyond what runs at once took half as long again as the work itself (32 rows of 8,192 keys)."""
    rng = np.random.default_rng(seed)
    rows = int(rng.integers(1, 97))
    lengths = np.exp(rng.uniform(0, 10, rows)).astype(np.int32) + 1
    pages = np.arange(rows * 1400, dtype=np.int32).reshape(rows, 1400)
    size = next(size for size in SIZES if size >= rows)
    work = divide_work(
        pages, lengths, np.arange(rows + 1), page_size=16, kv_heads=4, processors=132, slots=most_parts(size), sharers=9
    )
    assert len(work.items) <= room_for_items(work, size, 132, 4) <= (size if work.slots == 1 else max(size, 66))


def test_a_tile_that_is_not_cut_needs_no_merge_and_one_prefix_of_few_rows_is_read_by_the_other_list():
    def divided(requests, paths, prefix):
        pages, lengths, _ = tables(Case(requests, paths, prefix, 256), 16)
        rows = len(lengths)
        work = divide_work(
            pages, lengths, np.arange(rows + 1), page_size=16, kv_heads=4, processors=132, slots=most_parts(rows),
            sharers=9,
        )  # fmt: skip
        check_reads(work, pages, lengths, np.arange(rows + 1))
        return work

    assert divided(66, 5, 1024).slots == 1
    assert divided(1, 8, 8192).ends is not None and divided(1, 8, 16384).ends is None


def test_rows_that_share_more_with_each_other_than_with_all_have_tiles_of_their_own():
    """Four requests after one system prompt of 1,024 keys, each with 4,096 more that its five paths share."""
    pages = np.zeros((20, 64 + 256 + 4), dtype=np.int32)
    pages[:, :64] = np.arange(64)
    pages[:, 64:320] = 1000 + np.arange(4 * 256).reshape(4, 256).repeat(5, 0)
    pages[:, 320:] = 5000 + np.arange(80).reshape(20, 4)
    lengths, borders = np.full(20, 1024 + 4096 + 60, dtype=np.int32), np.arange(21)
    work = divide_work(pages, lengths, borders, page_size=16, kv_heads=4, processors=132, slots=16, sharers=9)
    check_reads(work, pages, lengths, borders)
    assert (work.items[:, 2] - work.items[:, 1]).sum() == 4 * (1024 + 4096 + 5 * 64)


def test_a_graph_has_hardly_more_room_than_tiles_have_items():
    for requests, paths, room in ((32, 5, 96), (32, 3, 66), (10, 3, 66), (1, 8, 66), (170, 3, 256)):
        pages, lengths, _ = tables(Case(requests, paths, 1024, 128), 16)
        size = next(size for size in SIZES if size >= len(lengths))
        borders, slots = np.arange(len(lengths) + 1), most_parts(size)
        work = divide_work(pages, lengths, borders, page_size=16, kv_heads=4, processors=132, slots=slots, sharers=9)
        assert room_for_items(work, size, 132, 4) == room


@pytest.mark.parametrize("least_shared", [None, 64])
@pytest.mark.parametrize("seed", range(20))
def test_every_query_reads_each_of_its_keys_once_however_rows_share_them(seed, least_shared):
    """Beside the plain way to say it: key by key. Rows share whatever beginning of their neighbour's pages."""
    rng = np.random.default_rng(seed)
    rows, width = int(rng.integers(1, 24)), int(rng.integers(1, 60))
    pages = np.arange(rows * width, dtype=np.int32).reshape(rows, width)
    for row in range(1, rows):
        shared = rng.choice([0, width // 3, width // 2, width])
        pages[row, :shared] = pages[row - 1, :shared]
    lengths = (width * 16 - rng.integers(0, 16, rows)).astype(np.int32)
    counts = rng.integers(1, 4, rows) if seed % 2 else np.ones(rows, dtype=np.int64)
    borders = np.concatenate(([0], np.cumsum(counts)))
    slots = most_parts(int(borders[-1]))
    work = divide_work(
        pages, lengths, borders, page_size=16, kv_heads=4, processors=132, slots=slots, sharers=9,
        least_shared=least_shared,
    )  # fmt: skip
    check_reads(with_sharers(work, 9, 16), pages, lengths, borders)
    check_reads(work, pages, lengths, borders)
    assert work.slots <= slots


@pytest.mark.parametrize("seed", range(12))
def test_a_list_that_is_moved_on_still_reads_every_key_once(seed):
    """Over steps in which rows mostly just go on; some fork, end, or bring several tokens."""
    rng = np.random.default_rng(seed)
    rows, prefix, own = int(rng.integers(1, 12)), 16 * int(rng.choice([0, 20, 200])), int(rng.integers(1, 40))
    pages = np.tile(np.arange(prefix // 16 + 12, dtype=np.int32), (rows, 1))
    pages[:, prefix // 16 :] += 1000 * np.arange(1, rows + 1, dtype=np.int32)[:, None]
    lengths = (prefix + rng.integers(1, own + 1, rows)).astype(np.int32)
    divider = SuccessiveWork(page_size=16, kv_heads=4, processors=132, sharers=9)
    moved = 0
    for step in range(60):
        if step % 17 == 16:  # one row ends, or begins anew
            lengths = lengths[1:] if len(lengths) > 1 and step % 2 else lengths
            lengths = np.append(lengths, np.int32(prefix + 1))
        counts = np.ones(len(lengths), dtype=np.int64)
        counts[0] += step % 17 == 8 and lengths[0] > 4
        borders = np.concatenate(([0], np.cumsum(counts)))
        listed = pages[np.arange(len(lengths)) % rows, : -(-int(lengths.max()) // 16)]
        before = divider._last and divider._last.work
        copies = before and [np.copy(array) for array in before[:6]]
        work = divider.divide(listed, lengths, borders, most_parts(int(borders[-1])))
        check_reads(work, listed, lengths, borders)
        if before:  # a step in flight may still read the list before
            assert all(np.array_equal(array, copy) for array, copy in zip(before[:6], copies, strict=True))
            moved += work.tokens is before.tokens
        lengths = lengths + np.int32(1)
    assert moved >= 20


@pytest.mark.parametrize("shared", [0, 32])
def test_a_list_is_moved_on_only_for_the_rows_that_it_has(shared, monkeypatch):
    """Others may follow that are as long as these would be; and a page that is full goes on in another one."""
    monkeypatch.setattr("megatron_multiverse.kernels.tree_decode.work.AT_ONCE", 0)
    first = np.tile(np.arange(36, dtype=np.int32), (4, 1))
    first[:, shared:] += 100 * np.arange(1, 5, dtype=np.int32)[:, None]
    lengths, borders = np.array([535, 540, 550, 559], dtype=np.int32), np.arange(5)
    for others, longer in ((first + np.int32(1000), 0), (first[[1, 0, 3, 2]], 0), (first, 1)):
        divider = SuccessiveWork(page_size=16, kv_heads=4, processors=132, sharers=9)
        assert (divider.divide(first, lengths + longer, borders, 16).tokens.shape[1] > 1) == (shared > 0)
        work = divider.divide(others, lengths + np.int32(longer + 1), borders, 16)
        check_reads(work, others, lengths + np.int32(longer + 1), borders)


def test_the_order_of_full_pages_and_what_follows_the_last_one_do_not_matter():
    query, keys, values, pages, lengths, borders = make_case([1], [18])
    expected = tree_decode(query, keys, values, pages, lengths, borders, 1.0)
    shuffled = torch.cat([pages[:, torch.randperm(4)], pages[:, 4:]], 1)
    torch.testing.assert_close(
        tree_decode(query, keys, values, shuffled, lengths, borders, 1.0), expected, atol=1e-12, rtol=0
    )
    padded = torch.cat([pages, torch.full((1, 3), 29, dtype=torch.int32)], 1)
    assert torch.equal(tree_decode(query, keys, values, padded, lengths, borders, 1.0), expected)


def test_copies_read_everything_before_they_write():
    cached = torch.arange(24.0).view(2, 4, 3, 1)
    copy_slots(cached, torch.tensor([0, 1]), torch.tensor([1, 3]))
    assert cached[0, :, 0, 0].tolist() == [0.0, 0.0, 6.0, 3.0]
    assert cached[1, :, 2, 0].tolist() == [14.0, 14.0, 20.0, 17.0]
