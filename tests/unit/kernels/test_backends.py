"""The backends' plans, the choice between them and what they refuse, on the CPU."""

from __future__ import annotations

import dataclasses
import logging
from typing import get_args, get_type_hints

import pytest
import torch
import torch.nn.functional as F
from random_layouts import random_labels
from torch.nn.attention.flex_attention import flex_attention as eager_flex

from megatron_multiverse.config import LayerConfig
from megatron_multiverse.errors import ConfigError
from megatron_multiverse.kernels.multiverse_attention import (
    BACKENDS,
    AttentionCase,
    AttentionLayout,
    backends,
    check_backend,
    choose_backend,
    flash4,
    flex,
    multiverse_attention,
    multiverse_attention_reference,
    tile_lists,
    visibility,
)

CPU = AttentionCase("cpu", torch.float32, 16)
GPU = AttentionCase("cuda", torch.bfloat16, 128)


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> dict[str, str | None]:
    """As if there were an H100 with all packages; ["flash4"] is what is wrong with flash-attn-4."""
    wrong: dict[str, str | None] = {"flash4": None}
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(flash4, "_missing", lambda: wrong["flash4"])
    choose_backend.cache_clear()
    check_backend.cache_clear()
    backends._log_once.cache_clear()
    return wrong


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
    """Of flex this proves the mask function and the padding alone: eager FlexAttention looks at no block list. The
    lists are proved by the next test, and on the GPU by the kernels."""
    plain = AttentionLayout(torch.stack([random_labels(200, seed) for seed in range(2)]))
    layout = plain if kind == "in order" else permuted_layout(200, 200 if kind == "permuted" else 70)
    _, s_q, s_k = layout.shape
    q, k, v = (torch.randn(2, heads, s, 16) for heads, s in ((4, s_q), (2, s_k), (2, s_k)))
    if name == "dense":
        out = multiverse_attention(q, k, v, layout, backend="dense")
    else:
        plan = flex.flex_plan(layout, CPU)
        assert (plan.queries, plan.keys) == (128 if kind == "other keys" else 256, 256)
        padded = [F.pad(x, (0, 0, 0, n - x.shape[2])) for x, n in ((q, plan.queries), (k, 256), (v, 256))]
        out = eager_flex(*padded, block_mask=plan.block_mask, enable_gqa=True)[:, :, :s_q]
    want = multiverse_attention_reference(q, k, v, visibility(layout.r, layout.index, layout.key_r, layout.key_index))
    torch.testing.assert_close(out, want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["in order", "permuted", "other keys"])
def test_block_lists_of_flex_name_exactly_the_blocks_with_something_to_see(kind: str) -> None:
    """Expanded token by token as a kernel walks them: full blocks are seen without asking the mask function, partial
    ones as it says, and blocks in neither list not at all; from the side of the queries and of the keys."""
    r = torch.stack([random_labels(700, seed) for seed in range(2)])
    layout = AttentionLayout(r) if kind == "in order" else permuted_layout(700, 700 if kind == "permuted" else 300)
    _, s_q, s_k = layout.shape
    mask = flex.flex_plan(layout, CPU).block_mask
    want = visibility(layout.r, layout.index, layout.key_r, layout.key_index)[:, 0]
    rows, columns, batch = torch.arange(s_q)[:, None], torch.arange(s_k)[None], torch.arange(2)[:, None, None]
    asked = mask.mask_mod(batch, torch.zeros(()), rows[None], columns[None])
    partial, full = (
        block_matrix(mask.kv_num_blocks, mask.kv_indices),
        block_matrix(mask.full_kv_num_blocks, mask.full_kv_indices),
    )
    q_size, k_size = mask.BLOCK_SIZE
    walked = [blocks[:, rows // q_size, columns // k_size] for blocks in (partial, full)]
    assert torch.equal((walked[0] & asked) | walked[1], want)
    assert not (walked[0] & walked[1]).any()
    assert kind != "in order" or (walked[1].any() and not (walked[0] | walked[1]).all())
    for counts, indices, blocks in (
        (mask.q_num_blocks, mask.q_indices, partial),
        (mask.full_q_num_blocks, mask.full_q_indices, full),
    ):
        assert torch.equal(block_matrix(counts, indices).mT, blocks)


def block_matrix(counts: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """bool [b, rows, columns] of the blocks that the lists of a BlockMask name."""
    counts, indices = counts[:, 0], indices[:, 0].long()
    named = torch.arange(indices.shape[-1]) < counts[..., None]
    return (F.one_hot(indices.where(named, 0), indices.shape[-1]).bool() & named[..., None]).any(-2)


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


def test_the_plan_of_a_layout_is_made_once_for_each_case() -> None:
    made: list[AttentionCase] = []
    layout = AttentionLayout(torch.arange(6)[None])

    def prepare(given: AttentionLayout, case: AttentionCase) -> object:
        made.append(case)
        return object()

    cases = [CPU, dataclasses.replace(CPU), dataclasses.replace(CPU, deterministic=True)]
    plans = [layout.plan(prepare, case) for case in cases]
    assert plans[0] is plans[1] and plans[1] is not plans[2] and len(made) == 2


def test_a_layout_whose_labels_were_changed_in_place_is_refused() -> None:
    """Its plans belong to the labels as they were."""
    r, x = torch.arange(6)[None].clone(), torch.randn(1, 2, 6, 8)
    layout = AttentionLayout(r)
    multiverse_attention(x, x, x, layout)
    multiverse_attention(x, x, x, layout)
    r.copy_(r.flip(1))
    with pytest.raises(ValueError, match="changed in place: make a new AttentionLayout"):
        multiverse_attention(x, x, x, layout)
    with torch.inference_mode():
        labels = torch.arange(6)[None]
        assert multiverse_attention(x, x, x, AttentionLayout(labels)).shape == x.shape


def test_the_scale_of_the_scores_reaches_the_backend() -> None:
    layout, (q, k, v) = AttentionLayout(torch.arange(6)[None]), torch.randn(3, 1, 2, 6, 8)
    got = multiverse_attention(q, k, v, layout, softmax_scale=0.3)
    want = multiverse_attention_reference(q, k, v, visibility(layout.r), 0.3)
    torch.testing.assert_close(got, want)
    assert not torch.allclose(got, multiverse_attention(q, k, v, layout), atol=1e-3)


def test_a_backend_asked_for_by_name_says_why_it_cannot_run(hopper: dict[str, str | None]) -> None:
    for name in ("flex", "flash4"):
        with pytest.raises(ConfigError, match=rf"{name!r} cannot run here: .* CUDA.* set attention_backend to auto"):
            choose_backend(name, CPU)
    with pytest.raises(ConfigError, match="unknown attention_backend 'flesh', allowed: auto, flash4, flex, dense"):
        choose_backend("flesh", CPU)
    assert choose_backend("flash4", GPU) == "flash4"
    for change, reason in (
        ({"head_dim": 96}, r"head widths \(64, 128\), got 96"),
        ({"dtype": torch.float32}, "bfloat16 and float16, got torch.float32"),
        ({"deterministic": True, "placed": True}, "deterministic only for tokens in their order"),
    ):
        with pytest.raises(ConfigError, match=reason):
            choose_backend("flash4", dataclasses.replace(GPU, **change))


def test_flash4_is_for_hopper(hopper: dict[str, str | None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    assert "sm_80" in (flash4.flash4_problem(GPU) or "")


def test_what_is_wrong_with_the_package_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    missing, pinned = flash4._missing.__wrapped__, f"pip install '{flash4.PACKAGE}=={flash4.VERSION}'"
    found = {"version": flash4.VERSION}

    def version(name: str) -> str:
        if found["version"] is None:
            raise flash4.importlib.metadata.PackageNotFoundError(name)
        return found["version"]

    def broken(name: str) -> object:
        if name == "flash_attn.cute":
            raise ImportError("undefined symbol")
        return object()

    monkeypatch.setattr(flash4.importlib.metadata, "version", version)
    monkeypatch.setattr(flash4.importlib.util, "find_spec", lambda name: object())
    assert missing() is None
    for other in ("4.0.0b12", "4.0.0b36.dev3", "4.1.0"):
        found["version"] = other
        assert f"is version {other}, and our kernels are for {flash4.VERSION}: {pinned}" in missing()
    found["version"] = None
    assert f"is not installed: {pinned}" in missing()
    found["version"] = flash4.VERSION
    for module in ("flash_attn.cute", "cutlass", "quack"):
        monkeypatch.setattr(flash4.importlib.util, "find_spec", lambda name, gone=module: None if name == gone else 1)
        assert f"not its module {module} (it is not there)" in missing()
    monkeypatch.setattr(flash4.importlib.util, "find_spec", broken)
    assert "flash_attn.cute (ImportError: undefined symbol)" in missing()


def test_auto_takes_the_fastest_that_runs_and_says_why(
    hopper: dict[str, str | None], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        assert choose_backend("auto", CPU) == "dense"
        assert choose_backend("auto", dataclasses.replace(GPU, dtype=torch.float32)) == "dense"
        assert choose_backend("auto", GPU) == "flash4"
        assert choose_backend("auto", dataclasses.replace(GPU, head_dim=64)) == "flash4"  # the same news
        assert choose_backend("auto", dataclasses.replace(GPU, head_dim=32)) == "flex"
        assert choose_backend("auto", dataclasses.replace(GPU, head_dim=80)) == "dense"
        assert choose_backend("auto", dataclasses.replace(GPU, deterministic=True)) == "flash4"
        assert choose_backend("auto", dataclasses.replace(GPU, deterministic=True, placed=True)) == "flex"
        hopper["flash4"] = "the package is not installed"
        choose_backend.cache_clear()
        assert choose_backend("auto", GPU) == "flex"
    told = [record.getMessage() for record in caplog.records]
    assert told[:3] == [
        "attention backend: dense (on the CPU)",
        "attention backend: dense (torch.float32 is for exactness, not for speed)",
        "attention backend: flash4 (the fastest that runs here)",
    ]
    assert "80" in told[4] and "not flash4: the package is not installed" in told[-1] and len(told) == 7
    assert list(BACKENDS) == ["flash4", "flex", "dense"]
    # config/ imports no torch, so it has the names itself.
    assert set(get_args(get_type_hints(LayerConfig)["attention_backend"])) == {"auto", *BACKENDS}


def test_lists_made_elsewhere_are_used_where_they_fit() -> None:
    r = torch.stack([random_labels(200, seed) for seed in range(2)])
    lists = tile_lists(r)
    assert lists.shape == (2, 2, 2) and lists.fit(2, 256, 256)
    assert not lists.fit(2, 384, 256) and not lists.fit(1, 256, 256)
    plan = flex.flex_plan(AttentionLayout(r, lists=lists), CPU)
    assert plan.block_mask.kv_indices.data_ptr() == lists.q_partial.indices.data_ptr()
    with pytest.raises(ValueError, match=r"lists are for \(2, 1, 1\) tiles of 128"):
        AttentionLayout(r, lists=tile_lists(r[:, :100]))
    r = random_labels(2049, 7)[None]  # 17 tiles, of which flex's bucket makes 18
    layout = AttentionLayout(r, lists=tile_lists(r))
    assert layout.tile_lists(17 * 128, 17 * 128) is layout.lists
    own, padded = flex.flex_plan(layout, CPU).block_mask, tile_lists(r, length=18 * 128)
    assert torch.equal(own.kv_num_blocks, padded.q_partial.counts)
