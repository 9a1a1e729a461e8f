"""Lists of work that are moved on from step to step, while rows go on into further pages."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import pytest
import torch

from megatron_multiverse.kernels.decode_step import Moving, end_step
from megatron_multiverse.kernels.tree_decode import Moves, SuccessiveWork, Work, divide_work, most_parts, tiles
from tests.unit.kernels.listed_keys import check_reads, loaded_slots

Int32s = npt.NDArray[np.int32]


@pytest.fixture(autouse=True)
def few_keys_are_shared_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether it is faster or not."""
    monkeypatch.setattr("megatron_multiverse.kernels.tree_decode.work.AT_ONCE", 0, raising=False)


class Cache:
    """Rows that get pages when they need them, as an engine gives them.

    Args:
        rng: draws.
        page_size: keys per page.
        shared: pages that rows share before their own, a list for each row.
        own: keys of each row alone.
    """

    def __init__(self, rng: np.random.Generator, page_size: int, shared: list[list[int]], own: Int32s) -> None:
        self.page_size, self.lists = page_size, [list(pages) for pages in shared]
        used = {page for pages in shared for page in pages}
        # Pages are given in no order.
        self.free = [page for page in rng.permutation(20_000).tolist() if page not in used]
        self.lengths = np.array([len(pages) * page_size for pages in shared], dtype=np.int32) + own

    def step(self) -> tuple[Int32s, Int32s]:
        """Pages and lengths of a step; those of the step before stay as they are."""
        for pages, length in zip(self.lists, self.lengths.tolist(), strict=True):
            while len(pages) * self.page_size < length:
                pages.append(self.free.pop())
        table = np.full((len(self.lists), max(map(len, self.lists))), 20_000, dtype=np.int32)
        for row, pages in enumerate(self.lists):
            table[row, : len(pages)] = pages
        return table, self.lengths.copy()


def random_tree(rng: np.random.Generator, page_size: int) -> Cache:
    """Requests of which some share a beginning, each in paths, of which some have paths of their own; or the paths of
    one request alone."""
    if rng.random() < 0.3:
        paths = int(rng.integers(6, 10))
        shared = [list(range(int(rng.integers(640, 1400)) // page_size))] * paths
        return Cache(rng, page_size, shared, rng.integers(1, 60, paths).astype(np.int32))
    fresh = iter(range(20_000))

    def some_pages(most_keys: int) -> list[int]:
        return [next(fresh) for _ in range(int(rng.integers(0, most_keys // page_size + 1)))]

    system = some_pages(600)
    shared = []
    for _ in range(int(rng.integers(1, 6))):
        prefix = (system if rng.random() < 0.5 else []) + some_pages(1400)
        for _ in range(int(rng.integers(1, 9))):
            inner = some_pages(500) if rng.random() < 0.3 else []
            shared += [prefix + inner] * (int(rng.integers(2, 5)) if inner else 1)
    return Cache(rng, page_size, shared, rng.integers(1, 300, len(shared)).astype(np.int32))


def play(cache: Cache, steps: int, divider: SuccessiveWork) -> Iterator[tuple[Work, Int32s, Int32s]]:
    """(list, pages, lengths) of so many steps, in each of which every row has a key more."""
    for _ in range(steps):
        pages, lengths = cache.step()
        borders = np.arange(len(lengths) + 1)
        yield divider.divide(pages, lengths, borders, most_parts(len(lengths))), pages, lengths
        cache.lengths += np.int32(1)


def successive(page_size: int) -> SuccessiveWork:
    return SuccessiveWork(page_size=page_size, kv_heads=4, processors=132, sharers=9)


@pytest.mark.parametrize("page_size", [4, 16, 64])
@pytest.mark.parametrize("seed", range(8))
def test_lists_of_random_trees_go_on_over_page_borders(
    seed: int, page_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every step's list has every key that a row sees once and no other, and few are made anew."""
    rng = np.random.default_rng((seed, page_size))
    monkeypatch.setattr(tiles, "HUGE", int(rng.choice([300, 8192])))
    cache, divider, steps, made = random_tree(rng, page_size), successive(page_size), 40, 0
    before: Work | None = None
    arrays: list[tuple[npt.NDArray[np.generic], npt.NDArray[np.generic]]] = []
    for work, pages, lengths in play(cache, steps, divider):
        check_reads(work, pages, lengths, np.arange(len(lengths) + 1), page_size)
        assert all(np.array_equal(array, copy) for array, copy in arrays), "a step in flight may still read these"
        arrays = [(array, array.copy()) for array in (*work, pages, lengths) if isinstance(array, np.ndarray)]
        made += before is None or work.tokens is not before.tokens
        before = work
    assert made <= 1 + steps // tiles.AHEAD


def on_device(work: Work, moves: Moves) -> Moving:
    """Copies of what a device moves on; the rest of a step is not looked at here."""
    rows = torch.zeros(0, dtype=torch.int64)
    numbers = (work.items, work.tokens, work.limits, work.pages, *moves)
    return Moving(rows, rows, rows, rows, *(torch.from_numpy(x.copy()) for x in numbers))


@pytest.mark.parametrize("page_size", [2, 4, 16, 64])
@pytest.mark.parametrize("seed", range(8))
def test_a_device_moves_lists_on_until_a_row_needs_a_page(
    seed: int, page_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The host's list follows after as many steps, and is the same as if it had gone every one of them."""
    rng = np.random.default_rng((seed, page_size))
    monkeypatch.setattr(tiles, "HUGE", int(rng.choice([300, 8192])))
    cache, divider = random_tree(rng, page_size), successive(page_size)
    work, moving, moved = None, None, 0
    for _ in range(80):
        pages, lengths = cache.step()
        borders = np.arange(len(lengths) + 1)
        if moving is None or work is None or (lengths % page_size == 1).any() or rng.random() < 0.1:
            work = divider.divide(pages, lengths, borders, most_parts(len(lengths)))
            moving = None if divider.moves is None else on_device(work, divider.moves)
        else:
            end_step(None, torch.zeros(0), moving, page_size)
            moved += 1
            found = {name: getattr(moving, name).numpy() for name in ("items", "limits", "pages")}
            work = work._replace(**found, ends=None)
        check_reads(work, pages, lengths, borders, page_size)
        cache.lengths += np.int32(1)
    assert moved or page_size == 2 or len(lengths) > page_size


def test_what_was_tried_above_are_tiles_of_several_widths_rows_alone_and_items_of_several_rows() -> None:
    kinds = set()
    for seed in range(8):
        for page_size in (4, 16, 64):
            rng = np.random.default_rng((seed, page_size))
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(tiles, "HUGE", int(rng.choice([300, 8192])))
                ((work, _, _),) = play(random_tree(rng, page_size), 1, successive(page_size))
            kinds.add((work.tokens.shape[1], work.ends is None))
    assert kinds >= {(1, True), (9, True), (2, False), (4, False), (9, False)}


@pytest.mark.parametrize(("requests", "paths", "prefix"), [(32, 3, 1024), (19, 5, 1024), (12, 8, 1024), (12, 8, 4096)])
def test_places_for_further_pages_are_few(requests: int, paths: int, prefix: int) -> None:
    """Programs look at them in vain: at less than two hundredths more keys, and at most a little over three."""
    rng = np.random.default_rng(requests)
    shared = [list(range(n * prefix // 16, (n + 1) * prefix // 16)) for n in range(requests) for _ in range(paths)]
    cache = Cache(rng, 16, shared, rng.integers(1, 500, len(shared)).astype(np.int32))
    more: list[float] = []
    items: list[float] = []
    for work, pages, lengths in play(cache, 48, successive(16)):
        slots, borders = most_parts(len(lengths)), np.arange(len(lengths) + 1)
        alone = divide_work(pages, lengths, borders, page_size=16, kv_heads=4, processors=132, slots=slots, sharers=9)
        if alone.tokens.shape[1] == work.tokens.shape[1]:  # else another width has become the better one
            keys, least = (int((one.items[:, 2] - one.items[:, 1]).sum()) for one in (work, alone))
            more.append(keys / least - 1)
            items.append(len(work.items) / len(alone.items))
    assert len(more) > 40 and 0 < np.mean(more) < 0.018 and max(more) < 0.035 and np.mean(items) < 1.03


def test_a_row_that_shares_all_that_it_has_goes_on_into_a_page_of_its_own() -> None:
    """Two paths have begun and have no key yet: their pages begin in the next step."""
    shared = [list(range(40))] * 3
    cache, divider = Cache(np.random.default_rng(0), 16, shared, np.array([0, 0, 5], dtype=np.int32)), successive(16)
    works = []
    for work, pages, lengths in play(cache, 4, divider):
        check_reads(work, pages, lengths, np.arange(4))
        works.append(work)
    assert works[0].tokens.shape[1] > 1 and all(work.tokens is works[0].tokens for work in works)


@pytest.mark.parametrize("huge", [300, 8192])
@pytest.mark.parametrize("page_size", [1, 2])
def test_rows_need_a_page_in_every_step_where_pages_are_small(
    huge: int, page_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiles, "HUGE", huge)
    shared = [list(range(512 // page_size))] * 8
    cache = Cache(np.random.default_rng(2), page_size, shared, np.arange(40, 48, dtype=np.int32))
    works = []
    for work, pages, lengths in play(cache, 20, successive(page_size)):
        check_reads(work, pages, lengths, np.arange(9), page_size)
        works.append(work)
    assert works[0].tokens.shape[1] > 1 and (works[0].ends is None) == (huge == 300)
    made = 1 + sum(after.tokens is not before.tokens for before, after in pairwise(works))
    assert made <= 2


@pytest.mark.parametrize("huge", [300, 8192])
def test_a_list_is_made_anew_where_a_row_lists_another_page_than_before(
    huge: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only a row that is full may; that one goes on in whichever page it is given."""
    monkeypatch.setattr(tiles, "HUGE", huge)
    first = np.tile(np.arange(40, dtype=np.int32), (8, 1))
    first[:, 32:] += 100 * np.arange(1, 9, dtype=np.int32)[:, None]
    lengths, borders = np.array([544, 540, 550, 559, 513, 520, 560, 530], dtype=np.int32), np.arange(9)
    # (row, page): of a full row the next page, and one that it has; of another its last page, and one that all share.
    for row, page, moves in ((0, 34, True), (0, 33, False), (1, 33, False), (2, 0, False)):
        divider = successive(16)
        before = divider.divide(first, lengths, borders, 16)
        assert before.tokens.shape[1] > 1 and (before.ends is None) == (huge == 300)
        other = first.copy()
        other[row, page] = 5000
        work = divider.divide(other, lengths + np.int32(1), borders, 16)
        check_reads(work, other, lengths + np.int32(1), borders)
        assert (work.tokens is before.tokens) == moves


def test_nothing_is_loaded_of_a_place_that_is_kept() -> None:
    shared = [list(range(64))] * 4
    cache = Cache(np.random.default_rng(1), 16, shared, np.array([16, 16, 32, 1], dtype=np.int32))
    ((work, _, lengths),) = play(cache, 1, successive(16))
    assert (work.pages == -1).sum() == 12 and work.room == 48
    assert len(loaded_slots(work, 16)) == 64 * 16 + lengths.sum() - 4 * 64 * 16
