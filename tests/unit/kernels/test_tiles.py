"""Tile classes and lists against the definition, on the CPU."""

from __future__ import annotations

import pytest
import torch
from random_layouts import random_labels

from megatron_multiverse.kernels.multiverse_attention import count_visible_pairs, flex, tile_lists, tiles, visibility

SIZE = 8


def dense_classes(lists: tiles.TileLists, side: str) -> torch.Tensor:
    """The classes that the lists of one side stand for, [b, t_q, t_k]."""
    partial, full = getattr(lists, f"{side}_partial"), getattr(lists, f"{side}_full")
    b, _, rows, columns = partial.indices.shape
    classes = torch.zeros(b, rows, columns, dtype=torch.uint8)
    for kind, found in ((tiles.PARTIAL, partial), (tiles.FULL, full)):
        for n in range(b):
            for row in range(rows):
                columns = found.indices[n, 0, row, : found.counts[n, 0, row]].long()
                assert torch.equal(columns, columns.sort().values)
                assert not classes[n, row, columns].any()
                classes[n, row, columns] = kind
    return classes if side == "q" else classes.transpose(1, 2)


@pytest.mark.parametrize("length", [1, 7, 8, 9, 61, 64, 130])
def test_lists_equal_the_definition(length: int) -> None:
    for seed in range(6):
        r = torch.stack([random_labels(length, seed * 2 + n) for n in range(2)])
        lists = tile_lists(r, size=SIZE)
        want = tiles.tile_classes_brute_force(r, size=SIZE)
        assert torch.equal(dense_classes(lists, "q"), want)
        assert torch.equal(dense_classes(lists, "k"), want)


@pytest.mark.parametrize("length", [1, 8, 9, 61, 64, 130])
@pytest.mark.parametrize("query_size", [5, 16])
def test_query_tiles_of_another_size_never_lose_a_visible_pair_and_full_is_exact(length: int, query_size: int) -> None:
    for seed in range(6):
        r = torch.stack([random_labels(length, seed * 2 + n) for n in range(2)])
        lists = tile_lists(r, size=SIZE, query_size=query_size)
        want = tiles.tile_classes_brute_force(r, size=SIZE, query_size=query_size)
        assert lists.shape == want.shape and (lists.query_size, lists.key_size) == (query_size, SIZE)
        for side in ("q", "k"):
            got = dense_classes(lists, side)
            assert torch.equal(got == tiles.FULL, want == tiles.FULL)
            assert not ((got == tiles.EMPTY) & (want != tiles.EMPTY)).any()


def test_permuted_tokens_never_lose_a_visible_pair_and_full_is_exact() -> None:
    for seed in range(10):
        order = torch.randperm(61, generator=torch.Generator().manual_seed(seed))
        if seed % 2:  # chunks in another order, as context parallelism deals them out
            order = torch.cat(torch.arange(61).chunk(5)[::-1])
        r, index = random_labels(61, seed)[order][None], order[None].int()
        got = dense_classes(tile_lists(r, index, size=SIZE), "q")
        want = tiles.tile_classes_brute_force(r, index, size=SIZE)
        assert torch.equal(got == tiles.FULL, want == tiles.FULL)
        assert not ((got == tiles.EMPTY) & (want != tiles.EMPTY)).any()


def test_keys_of_other_tokens_never_lose_a_visible_pair_and_full_is_exact() -> None:
    for seed in range(10):
        order = torch.cat(torch.arange(61).chunk(5)[::-1])
        r, index = random_labels(61, seed)[order][None], order[None].int()
        local = slice(7 * (seed % 3), 7 * (seed % 3) + 20)
        lists = tile_lists(r[:, local], index[:, local], r, index, size=SIZE)
        want = tiles.tile_classes_brute_force(r[:, local], index[:, local], r, index, size=SIZE)
        assert lists.shape == (1, 3, 8)
        for side in ("q", "k"):
            got = dense_classes(lists, side)
            assert torch.equal(got == tiles.FULL, want == tiles.FULL)
            assert not ((got == tiles.EMPTY) & (want != tiles.EMPTY)).any()


def test_tiles_of_padding_are_visited_on_the_diagonal_alone() -> None:
    r = random_labels(20, 0)[None]
    classes = dense_classes(tile_lists(r, size=SIZE, length=40), "q")
    assert classes.shape == (1, 5, 5)
    assert torch.equal(classes[:, :3, :3], tiles.tile_classes_brute_force(r, size=SIZE))
    assert torch.equal(classes[0, 3:], torch.eye(5, dtype=torch.uint8)[3:] * tiles.PARTIAL)
    assert not classes[0, :3, 3:].any()


@pytest.mark.parametrize("permuted", [False, True])
def test_pairs_are_counted_without_the_whole_mask(permuted: bool) -> None:
    for seed in range(5):
        r, index = torch.stack([random_labels(61, seed * 2 + n) for n in range(2)]), None
        if permuted:
            order = torch.randperm(61, generator=torch.Generator().manual_seed(seed))
            r, index = r[:, order], order.int().expand(2, -1)
        assert count_visible_pairs(r, index, rows=8) == visibility(r, index).sum()


def test_buckets_are_few_and_waste_little() -> None:
    lengths = [flex.bucket_length(n) for n in range(1, 40000, 7)]
    for n, length in zip(range(1, 40000, 7), lengths, strict=True):
        assert length % tiles.TILE == 0 and length >= n
        assert length - n < max(tiles.TILE, 0.125 * n + 1)
    assert len({x for x in lengths if 16384 < x <= 32768}) == flex.BUCKETS_PER_OCTAVE


def test_the_order_of_writing_counts_larger_key_tiles() -> None:
    for seed in range(5):
        r = torch.stack([random_labels(90, seed * 2 + n) for n in range(2)])
        lists = tile_lists(r, size=SIZE)
        met = dense_classes(lists, "q") != tiles.EMPTY
        orders = tiles.write_order(lists)
        for found, order in zip((lists.k_partial, lists.k_full), orders, strict=True):
            assert order.shape == found.indices.shape and order.dtype == torch.int32
            for b, n in ((b, n) for b in range(2) for n in range(met.shape[1])):
                for place in range(int(found.counts[b, 0, n])):
                    m = int(found.indices[b, 0, n, place])
                    assert int(order[b, 0, n, place]) == int(met[b, m, n + 1 :].sum())
