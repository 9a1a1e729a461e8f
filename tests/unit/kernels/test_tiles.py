"""Tile classes and lists against the definition, and the backends' plans and refusals, all on the CPU."""

from __future__ import annotations

import pytest
import torch
from random_layouts import random_labels
from torch.nn.attention.flex_attention import flex_attention as eager_flex

from megatron_multiverse.errors import ConfigError
from megatron_multiverse.kernels.multiverse_attention import (
    count_visible_pairs,
    flash4,
    flex,
    multiverse_attention_reference,
    tiles,
    visibility,
)
from megatron_multiverse.model import backends
from megatron_multiverse.model.backends import BACKENDS, select_backend

SIZE = 8


def dense_classes(lists: tiles.TileLists, side: str) -> torch.Tensor:
    """The classes that the lists of one side stand for, [b, t (queries), t (keys)]."""
    partial, full = getattr(lists, f"{side}_partial"), getattr(lists, f"{side}_full")
    b, _, t = partial.counts.shape
    classes = torch.zeros(b, t, t, dtype=torch.uint8)
    for kind, found in ((tiles.PARTIAL, partial), (tiles.FULL, full)):
        for n in range(b):
            for row in range(t):
                columns = found.indices[n, 0, row, : found.counts[n, 0, row]].long()
                assert torch.equal(columns, columns.sort().values)
                assert not classes[n, row, columns].any()
                classes[n, row, columns] = kind
    return classes if side == "q" else classes.transpose(1, 2)


@pytest.mark.parametrize("length", [1, 7, 8, 9, 61, 64, 130])
def test_lists_equal_the_definition(length: int) -> None:
    for seed in range(6):
        r = torch.stack([random_labels(length, seed * 2 + n) for n in range(2)])
        lists = tiles.tile_lists(r, size=SIZE)
        want = tiles.tile_classes_brute_force(r, size=SIZE)
        assert torch.equal(dense_classes(lists, "q"), want)
        assert torch.equal(dense_classes(lists, "k"), want)


def test_permuted_tokens_never_lose_a_visible_pair_and_full_is_exact() -> None:
    for seed in range(10):
        order = torch.randperm(61, generator=torch.Generator().manual_seed(seed))
        if seed % 2:  # chunks in another order, as context parallelism deals them out
            order = torch.cat(torch.arange(61).chunk(5)[::-1])
        r, index = random_labels(61, seed)[order][None], order[None].int()
        got = dense_classes(tiles.tile_lists(r, index, size=SIZE), "q")
        want = tiles.tile_classes_brute_force(r, index, size=SIZE)
        assert torch.equal(got == tiles.FULL, want == tiles.FULL)
        assert not ((got == tiles.EMPTY) & (want != tiles.EMPTY)).any()


def test_tiles_of_padding_are_visited_on_the_diagonal_alone() -> None:
    r = random_labels(20, 0)[None]
    classes = dense_classes(tiles.tile_lists(r, size=SIZE, length=40), "q")
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


@pytest.mark.parametrize("permuted", [False, True])
def test_the_flex_plan_means_the_visibility_rule(permuted: bool) -> None:
    r = torch.stack([random_labels(200, seed) for seed in range(2)])
    index = None
    if permuted:
        order = torch.randperm(200, generator=torch.Generator().manual_seed(0))
        r, index = r[:, order], order.int().expand(2, -1)
    plan = flex.flex_plan(r, index, torch.float32)
    assert plan.length == 256
    q, k, v = (torch.randn(2, heads, 200, 16) for heads in (4, 2, 2))
    padded = [torch.nn.functional.pad(x, (0, 0, 0, 56)) for x in (q, k, v)]
    out = eager_flex(*padded, block_mask=plan.block_mask, enable_gqa=True)[:, :, :200]
    want = multiverse_attention_reference(q, k, v, visibility(r, index))
    torch.testing.assert_close(out, want, rtol=0, atol=1e-5)


def test_a_backend_asked_for_by_name_says_why_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"'flex' cannot run here: .* CUDA"):
        select_backend("flex", "cpu", torch.bfloat16, 64)
    with pytest.raises(ConfigError, match=r"'flash4' cannot run here: .* CUDA"):
        select_backend("flash4", "cpu", torch.bfloat16, 64)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert "head widths (64, 128), got 96" in (flash4.flash4_problem("cuda", torch.bfloat16, 96) or "")
    assert "float32" in (flash4.flash4_problem("cuda", torch.float32, 128) or "")
    monkeypatch.setattr(flash4, "_missing", lambda: None)
    assert flash4.flash4_problem("cuda", torch.bfloat16, 128) is None
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    assert "sm_80" in (flash4.flash4_problem("cuda", torch.bfloat16, 128) or "")


def test_a_missing_package_is_named_with_its_version(monkeypatch: pytest.MonkeyPatch) -> None:
    missing = flash4._missing.__wrapped__

    def absent(name: str) -> str:
        raise flash4.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(flash4.importlib.metadata, "version", absent)
    assert f"install {flash4.PACKAGE}>={flash4.VERSION}" in missing()
    monkeypatch.setattr(flash4.importlib.metadata, "version", lambda name: "4.0.0b12")
    assert "is version 4.0.0b12" in missing()
    monkeypatch.setattr(flash4.importlib.metadata, "version", lambda name: flash4.VERSION)
    monkeypatch.setattr(flash4.importlib.util, "find_spec", lambda name: None)
    assert "flash_attn.cute" in missing()
    assert flash4._version_key("4.0.0") > flash4._version_key("4.0.0b36") > flash4._version_key("4.0.0b9")


def test_auto_takes_the_fastest_that_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    problems = {"flash4": None}
    monkeypatch.setattr(flash4, "_missing", lambda: problems["flash4"])
    choose = backends._auto
    assert choose("cpu", torch.bfloat16, 128)[0] == "dense"
    assert choose("cuda", torch.float32, 128)[0] == "dense"
    assert choose("cuda", torch.bfloat16, 128)[0] == "flash4"
    assert choose("cuda", torch.bfloat16, 32)[0] == "flex"
    name, reason = choose("cuda", torch.bfloat16, 80)
    assert name == "dense" and "80" in reason
    problems["flash4"] = "the package is not installed"
    name, reason = choose("cuda", torch.bfloat16, 128)
    assert name == "flex" and "not flash4: the package is not installed" in reason
    assert list(BACKENDS) == ["flash4", "flex", "dense"]


def test_lists_made_elsewhere_are_used_where_they_fit() -> None:
    r = torch.stack([random_labels(200, seed) for seed in range(2)])
    lists = tiles.tile_lists(r)
    assert lists.shape == (2, 2) and lists.fit(r, 256) and not lists.fit(r, 384) and not lists.fit(r[:1], 256)
    plan = flex.flex_plan(r, None, torch.float32, lists)
    assert plan.block_mask.kv_indices.data_ptr() == lists.q_partial.indices.data_ptr()
    other = flex.flex_plan(r, None, torch.float32, tiles.tile_lists(r[:, :100]))
    assert torch.equal(other.block_mask.kv_num_blocks, lists.q_partial.counts)
