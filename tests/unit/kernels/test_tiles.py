"""Tile classes and lists against the definition, and the backends' plans and refusals, all on the CPU."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from random_layouts import random_labels
from torch.nn.attention.flex_attention import flex_attention as eager_flex

from megatron_multiverse.errors import ConfigError
from megatron_multiverse.kernels.multiverse_attention import (
    AttentionLayout,
    count_visible_pairs,
    flash4,
    flex,
    multiverse_attention_reference,
    tiles,
    visibility,
)
from megatron_multiverse.model import backends
from megatron_multiverse.model.backends import BACKENDS, multiverse_attention, select_backend

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
        lists = tiles.tile_lists(r, size=SIZE)
        want = tiles.tile_classes_brute_force(r, size=SIZE)
        assert torch.equal(dense_classes(lists, "q"), want)
        assert torch.equal(dense_classes(lists, "k"), want)


@pytest.mark.parametrize("length", [1, 8, 9, 61, 64, 130])
@pytest.mark.parametrize("query_size", [5, 16])
def test_query_tiles_of_another_size_never_lose_a_visible_pair_and_full_is_exact(length: int, query_size: int) -> None:
    for seed in range(6):
        r = torch.stack([random_labels(length, seed * 2 + n) for n in range(2)])
        lists = tiles.tile_lists(r, size=SIZE, query_size=query_size)
        want = tiles.tile_classes_brute_force(r, size=SIZE, query_size=query_size)
        assert lists.shape == want.shape and lists.size == query_size
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
        got = dense_classes(tiles.tile_lists(r, index, size=SIZE), "q")
        want = tiles.tile_classes_brute_force(r, index, size=SIZE)
        assert torch.equal(got == tiles.FULL, want == tiles.FULL)
        assert not ((got == tiles.EMPTY) & (want != tiles.EMPTY)).any()


def test_keys_of_other_tokens_never_lose_a_visible_pair_and_full_is_exact() -> None:
    for seed in range(10):
        order = torch.cat(torch.arange(61).chunk(5)[::-1])
        r, index = random_labels(61, seed)[order][None], order[None].int()
        local = slice(7 * (seed % 3), 7 * (seed % 3) + 20)
        lists = tiles.tile_lists(r[:, local], index[:, local], r, index, size=SIZE)
        want = tiles.tile_classes_brute_force(r[:, local], index[:, local], r, index, size=SIZE)
        assert lists.shape == (1, 3, 8)
        for side in ("q", "k"):
            got = dense_classes(lists, side)
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


def permuted_layout(length: int, queries: int) -> AttentionLayout:
    """Labels of two samples in shuffled order; `queries` of the tokens ask, all of them are keys."""
    order = torch.randperm(length, generator=torch.Generator().manual_seed(length))
    r = torch.stack([random_labels(length, seed) for seed in range(2)])[:, order]
    index = order.int().expand(2, -1)
    if queries == length:
        return AttentionLayout(r, index)
    return AttentionLayout(r[:, :queries], index[:, :queries], r, index)


@pytest.mark.parametrize("kind", ["in order", "permuted", "other keys"])
@pytest.mark.parametrize("name", ["dense", "flex"])
def test_plans_mean_the_visibility_rule(name: str, kind: str) -> None:
    plain = AttentionLayout(torch.stack([random_labels(200, seed) for seed in range(2)]))
    layout = plain if kind == "in order" else permuted_layout(200, 200 if kind == "permuted" else 70)
    _, s_q, s_k = layout.shape
    q, k, v = (torch.randn(2, heads, s, 16) for heads, s in ((4, s_q), (2, s_k), (2, s_k)))
    if name == "dense":
        out = multiverse_attention(q, k, v, layout, backend="dense")
    else:
        plan = flex.flex_plan(layout, torch.float32)
        assert (plan.queries, plan.keys) == (128 if kind == "other keys" else 256, 256)
        padded = [F.pad(x, (0, 0, 0, n - x.shape[2])) for x, n in ((q, plan.queries), (k, 256), (v, 256))]
        out = eager_flex(*padded, block_mask=plan.block_mask, enable_gqa=True)[:, :, :s_q]
    want = multiverse_attention_reference(q, k, v, visibility(layout.r, layout.index, layout.key_r, layout.key_index))
    torch.testing.assert_close(out, want, rtol=0, atol=1e-5)


def test_a_query_that_sees_nothing_gets_zeros_and_passes_on_no_gradient() -> None:
    index, key_index = torch.tensor([[5, 1]], dtype=torch.int32), torch.tensor([[2, 3, 4]], dtype=torch.int32)
    layout = AttentionLayout(index, index, key_index, key_index)
    q, k, v = (torch.randn(1, 2, s, 8).requires_grad_() for s in (2, 3, 3))
    out = multiverse_attention(q, k, v, layout)
    assert not out[:, :, 1].any() and out[:, :, 0].all()
    reference = multiverse_attention_reference(q, k, v, visibility(index, index, key_index, key_index))
    torch.testing.assert_close(out, reference)
    dq, dk, dv = torch.autograd.grad(out[:, :, 1].sum(), (q, k, v))
    assert not (dq.any() or dk.any() or dv.any())


def test_a_layout_says_what_does_not_fit() -> None:
    r = torch.arange(6)[None]
    with pytest.raises(ValueError, match="key_r, key_index and index together"):
        AttentionLayout(r, key_r=r, key_index=r)
    with pytest.raises(ValueError, match="key_r, key_index and index together"):
        AttentionLayout(r, r, key_r=r)
    with pytest.raises(ValueError, match=r"r and index must be \[b, s_q\]"):
        AttentionLayout(r, r[:, :5])
    with pytest.raises(ValueError, match=r"\[b, s_k\] with b = 1"):
        AttentionLayout(r, r, r.expand(2, -1), r.expand(2, -1))
    q, k = torch.randn(1, 2, 5, 8), torch.randn(1, 2, 6, 8)
    with pytest.raises(ValueError, match=r"\(b, s_q, s_k\) = \(1, 5, 6\); it is for \(1, 6, 6\)"):
        multiverse_attention(q, k, k, AttentionLayout(r))


@pytest.mark.parametrize(
    ("h", "k", "v", "message"),
    [
        (4, (1, 2, 6, 8), (1, 2, 5, 8), "k and v alike"),
        (4, (1, 2, 6, 8), (1, 1, 6, 8), "k and v alike"),
        (4, (1, 2, 6, 8), (1, 2, 6, 4), "k and v alike"),
        (4, (1, 2, 6, 4), (1, 2, 6, 4), "k and v alike"),
        (4, (1, 3, 6, 8), (1, 3, 6, 8), "4 query heads must be a multiple of the 3 key heads"),
        (4, (2, 2, 6, 8), (2, 2, 6, 8), "the layout must be for"),
    ],
)
def test_shapes_of_keys_and_values_must_fit(h: int, k: tuple[int, ...], v: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        multiverse_attention(
            torch.randn(1, h, 6, 8), torch.randn(k), torch.randn(v), AttentionLayout(torch.arange(6)[None])
        )


def test_auto_and_its_choice_share_a_plan() -> None:
    layout, x = AttentionLayout(torch.arange(6)[None]), torch.randn(1, 2, 6, 8)
    for backend in ("auto", "dense"):
        multiverse_attention(x, x, x, layout, backend=backend)
    assert len(layout._plans) == 1


def test_the_plan_of_a_layout_is_made_once() -> None:
    made: list[torch.dtype] = []
    layout = AttentionLayout(torch.arange(6)[None])

    def prepare(given: AttentionLayout, dtype: torch.dtype) -> object:
        made.append(dtype)
        return object()

    plans = [layout.plan(prepare, dtype) for dtype in (torch.float32, torch.float32, torch.float64)]
    assert plans[0] is plans[1] and plans[1] is not plans[2] and len(made) == 2


def test_the_order_of_writing_counts_larger_key_tiles() -> None:
    for seed in range(5):
        r = torch.stack([random_labels(90, seed * 2 + n) for n in range(2)])
        lists = tiles.tile_lists(r, size=SIZE)
        met = dense_classes(lists, "q") != tiles.EMPTY
        orders = tiles.write_order(lists)
        for found, order in zip((lists.k_partial, lists.k_full), orders, strict=True):
            assert order.shape == found.indices.shape and order.dtype == torch.int32
            for b, n in ((b, n) for b in range(2) for n in range(met.shape[1])):
                for place in range(int(found.counts[b, 0, n])):
                    m = int(found.indices[b, 0, n, place])
                    assert int(order[b, 0, n, place]) == int(met[b, m, n + 1 :].sum())


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


def test_deterministic_mode_needs_the_version_our_kernels_were_written_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(flash4, "_missing", lambda: None)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    for version, wanted in ((flash4.VERSION, None), ("4.1.0", f"needs {flash4.PACKAGE} {flash4.VERSION} exactly")):
        monkeypatch.setattr(flash4.importlib.metadata, "version", lambda name, found=version: found)
        problem = flash4.flash4_problem("cuda", torch.bfloat16, 128)
        assert problem is None if wanted is None else wanted in (problem or "")
    r = torch.arange(8)[None]
    with pytest.raises(ValueError, match="set attention_backend to flex"):
        flash4.flash4_plan(AttentionLayout(r, r), torch.bfloat16)


@pytest.mark.parametrize("version", [flash4.VERSION, "4.1.0"])
def test_internals_are_imported_for_one_version_alone(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a stand-in for the packages: any other version brings the masks, and nothing of our kernels."""
    installed: list[bool] = []
    masks = ModuleType("flash4_masks")
    ours = SimpleNamespace(install=lambda: installed.append(True)) if version == flash4.VERSION else None
    for name, module in (("flash4_masks", masks), ("flash4_kernels", ours)):
        monkeypatch.setitem(sys.modules, f"{flash4.__package__}.{name}", module)  # None: importing it fails
        monkeypatch.delattr(sys.modules[flash4.__package__], name, raising=False)
    monkeypatch.setattr(flash4.importlib.metadata, "version", lambda name: version)
    assert flash4._masks.__wrapped__() is masks
    assert installed == [True] * (version == flash4.VERSION)


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
    assert lists.shape == (2, 2, 2) and lists.fit(2, 256, 256)
    assert not lists.fit(2, 384, 256) and not lists.fit(1, 256, 256)
    plan = flex.flex_plan(AttentionLayout(r, lists=lists), torch.float32)
    assert plan.block_mask.kv_indices.data_ptr() == lists.q_partial.indices.data_ptr()
    with pytest.raises(ValueError, match=r"lists are for \(2, 1, 1\) tiles of 128"):
        AttentionLayout(r, lists=tiles.tile_lists(r[:, :100]))
    r = random_labels(2049, 7)[None]  # 17 tiles, of which flex's bucket makes 18
    layout = AttentionLayout(r, lists=tiles.tile_lists(r))
    assert layout.tile_lists(17 * 128, 17 * 128) is layout.lists
    own, padded = flex.flex_plan(layout, torch.float32).block_mask, tiles.tile_lists(r, length=18 * 128)
    assert torch.equal(own.kv_num_blocks, padded.q_partial.counts)
