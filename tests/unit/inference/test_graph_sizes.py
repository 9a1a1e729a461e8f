"""Which graph a step fits, and that what it attends to there is what its rows see."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks.bench_host_step import HEADS, KV_HEADS, PROCESSORS, WEIGHTS
from megatron_multiverse.inference.step.graph_sizes import (
    KEYS,
    MOST_LISTED,
    MOST_SEEN,
    PROMPT_SIZES,
    ROWS,
    SIZES,
    Fit,
    GraphSizes,
    Kind,
)
from megatron_multiverse.inference.step.plan import SamplingArrays, StepPlan
from megatron_multiverse.inference.step.plan_buffer import PlanBuffer
from megatron_multiverse.kernels.tree_decode import most_cut, prompt_rows
from tests.unit.kernels.listed_keys import check_reads

PAGE = 16
NONE = np.zeros(0, dtype=np.int64)


def plan_of(counts: list[int], lengths: list[int], *, writes: int | None = None) -> StepPlan:
    """Rows that share nothing, each of which brings `counts` tokens and sees `lengths`, and wants a token."""
    borders = np.concatenate(([0], np.cumsum(counts)))
    tokens, width = int(borders[-1]), -(-max(lengths) // PAGE)
    rows = len(counts)
    return StepPlan(
        copies=np.zeros((0, 2), dtype=np.int64),
        ids=np.zeros(tokens, dtype=np.int64),
        sources=np.full(tokens, -1),
        positions=np.zeros(tokens, dtype=np.int64),
        borders=borders,
        pages=np.random.default_rng(rows).permutation(rows * width).astype(np.int32).reshape(rows, width),
        lengths=np.array(lengths, dtype=np.int32),
        write_slots=np.arange(writes or tokens),
        write_tokens=np.arange(writes or tokens),
        sample=np.arange(rows),
        sampling=SamplingArrays(keys=NONE, indices=NONE, temperature=NONE.astype(float)),
        scored=NONE,
        targets=NONE,
        num_scores=NONE,
        freed=NONE,
    )


def fit(counts: list[int], lengths: list[int], *, segments: bool = True, weights: int = WEIGHTS) -> Fit | None:
    sizes = GraphSizes(
        page_size=PAGE, heads=HEADS, kv_heads=KV_HEADS, processors=PROCESSORS, weights=weights, segments=segments
    )
    return sizes.fit(plan_of(counts, lengths), "greedy")


@pytest.mark.parametrize("seed", range(30))
def test_every_token_sees_its_keys_once_by_the_list_or_by_a_segment(seed: int) -> None:
    """Rows that decode, chunks of prompts after a prefix, short prompts, in any order."""
    rng = np.random.default_rng(seed)
    counts = rng.choice([1, 1, 1, 2, 30, 64, 65, 128, 129, 300], int(rng.integers(2, 24))).tolist()
    if seed % 2:
        counts.sort()  # as engines do it: what decodes comes first
    lengths = [count + int(rng.choice([0, 0, 17, 500])) for count in counts]
    found = fit(counts, lengths, weights=10**9)
    tokens, listed = sum(counts), ~prompt_rows(np.cumsum([0, *counts]))
    if np.cumsum(counts)[listed].max(initial=0) > ROWS[-1]:
        assert found is None
        return
    assert found is not None
    kind, work, segments, _ = found
    assert kind.size == next(size for size in (SIZES if segments is None else PROMPT_SIZES) if size >= tokens)
    seen = sum(x * y for x, y, alone in zip(counts, lengths, listed, strict=True) if not alone)
    by_list = tokens <= 128 or not seen or (seen <= MOST_LISTED and tokens <= 512)
    assert (segments is None) == by_list == (kind.keys == 0)
    assert (kind.items == 0) == (not by_list and not listed.any())
    plan = plan_of(counts, lengths)
    check_reads(work, plan.pages, plan.lengths, plan.borders, PAGE, segments)
    assert len(work.items) <= kind.items and len(work.counts) <= kind.rows and len(counts) <= kind.rows
    if segments is not None:
        assert len(segments.seen) <= kind.segments and len(segments.slots) <= kind.keys in KEYS
        assert kind.rows in (*ROWS, kind.size)


def test_a_graph_of_a_single_token_has_room_for_a_long_text() -> None:
    """After 64K tokens a step by calls takes five times as long; a block's conclusion there is one row."""
    assert fit([1], [1 << 20]) is not None
    found = fit([1] * 128, [1000] * 128)
    assert found is not None and found.kind.pages == 128 * 4096


def test_prompts_are_a_graph_until_the_gpu_multiplies_longer_than_calls_take() -> None:
    for count, weights, size in (
        (500, WEIGHTS, 512),
        (1000, WEIGHTS, 1024),
        (1300, WEIGHTS, None),
        (1300, WEIGHTS // 5, 1536),
    ):
        found = fit([1, count], [3000, count], weights=weights)
        assert (None if found is None else found.kind.size) == size


def test_what_a_graph_has_no_room_for_runs_without() -> None:
    assert fit([1, 1000], [50, MOST_SEEN // 1000]) is not None
    assert fit([1, 1000], [50, MOST_SEEN // 1000 + 1]) is None, "FlashAttention 4 takes half as long"
    assert fit([2] * 300 + [65], [2] * 300 + [65]) is None, "rows that are not of prompts come first"
    assert fit([600, *[2] * 100], [600, *[2] * 100]) is None, "segments"
    assert fit([65, *[2] * 60], [65, *[2] * 60]) is not None, "so few see little enough for the list"
    assert fit([600, 1], [600, 60]) is None, "a row that decodes stands behind a prompt of more tokens than rows"
    sizes = GraphSizes(page_size=PAGE, heads=28, kv_heads=4, processors=132, weights=WEIGHTS, segments=True)
    for count, most in ((200, 784), (600, 640 + 1024 + 16)):
        assert sizes.fit(plan_of([count], [count], writes=most), "greedy") is not None
        assert sizes.fit(plan_of([count], [count], writes=most + 1), "greedy") is None


def test_prompts_that_see_few_keys_are_listed_also_where_flash_attention_does_not_take_them() -> None:
    found = fit([300], [300], segments=False)
    assert found is not None and found.segments is None and found.kind.keys == 0 and found.kind.size == 384
    assert fit([300], [1000], segments=False) is None
    assert fit([700], [700], segments=False) is None


def test_a_graph_of_rows_of_unequal_length_has_their_shares() -> None:
    lengths = np.random.default_rng(0).permutation(np.linspace(100, 2000, 60).astype(int)).tolist()
    plan, found = plan_of([1] * 60, lengths), fit([1] * 60, lengths)
    assert found is not None and found.kind.programs == len(found.work.shares) - 1 == most_cut(PROCESSORS, KV_HEADS)
    check_reads(found.work, plan.pages, plan.lengths, plan.borders)
    buffer = PlanBuffer(found.kind, torch.device("cpu"))
    buffer.fill(plan, found)
    for name in ("shares", "items", "tokens", "counts"):
        want = getattr(found.work, name)
        assert np.array_equal(buffer.device[name][: len(want)].numpy(), want), name
    even = fit([1] * 60, [1000] * 60)
    assert even is not None and even.kind.programs == len(even.work.shares) == 0


def test_graphs_of_few_tokens_fit_the_projection_that_writes_into_the_cache() -> None:
    pytest.importorskip("triton")
    from megatron_multiverse.kernels.kv_write.triton_product import MOST_ROWS, fits

    few = [size for size in SIZES if size <= MOST_ROWS]
    assert few
    for size in few:
        kind = Kind(rows=size, size=size, items=1, sharers=1, slots=1, keys=0, draw="greedy")
        assert fits(size, 128, kind.writes), f"a graph of {size} tokens would fall back to two launches"
    assert not fits(MOST_ROWS + 1, 128, 32) and not fits(1, 96, 32)
