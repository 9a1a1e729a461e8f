"""Attention of prompts: FlashAttention 2 and 4 beside the plain version, alone and among rows that decode."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megatron_multiverse.kernels.multiverse_attention.flash4 import flash4_problem
from megatron_multiverse.kernels.multiverse_attention.layout import AttentionCase
from megatron_multiverse.kernels.tree_decode import DeviceSegments, Segments, TreeDecode, cut_segments, tree_decode
from megatron_multiverse.kernels.tree_decode import prompt as prompt_module
from megatron_multiverse.kernels.tree_decode.prompt import attend_segments

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]
PAGE = 16


def make_case(counts, lengths, heads, kv_heads, dim):
    """(query, keys, values), and (pages, lengths, borders) of rows that share nothing; NaN in all that no row has."""
    rng = np.random.default_rng(sum(lengths))
    torch.manual_seed(sum(lengths))
    per_row = [-(-length // PAGE) for length in lengths]
    numbers = rng.permutation(sum(per_row) + 3).astype(np.int32)
    pages = np.full((len(counts), max(per_row)), numbers[-1])
    there = torch.zeros(len(numbers), PAGE, dtype=torch.bool)
    for row, length in enumerate(lengths):
        pages[row, : per_row[row]] = numbers[sum(per_row[:row]) : sum(per_row[: row + 1])]
        there[pages[row, np.arange(length) // PAGE], np.arange(length) % PAGE] = True
    query = torch.randn(sum(counts), heads, dim, device="cuda", dtype=torch.bfloat16)
    keys, values = torch.randn(2, len(numbers), PAGE, kv_heads, dim, device="cuda", dtype=torch.bfloat16)
    keys[~there.cuda()] = values[~there.cuda()] = float("nan")
    rows = pages.astype(np.int32), np.array(lengths, dtype=np.int32), np.cumsum([0, *counts]).astype(np.int64)
    return (query, keys, values), rows


def check(got, tensors, rows, chosen=None):
    """Beside the plain version, which reads in double precision on the CPU; `chosen` are the tokens to be compared."""
    query, keys, values = (x.cpu().double() for x in tensors)
    want = tree_decode(query, keys, values, *map(torch.from_numpy, rows), query.shape[2] ** -0.5)
    if chosen is not None:
        got, want = got[chosen], want[chosen]
    assert (got.cpu().double() - want).norm() / want.norm() < 5e-3


@pytest.mark.parametrize("way", ["flash4", "torch"])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(28, 4, 128), (12, 2, 128), (14, 2, 64), (8, 8, 128)])
@pytest.mark.parametrize(("count", "length"), [(65, 65), (2048, 2048), (130, 1000), (777, 5003)])
def test_a_prompt_after_other_tokens_equals_the_formula(way, heads, kv_heads, dim, count, length, monkeypatch):
    monkeypatch.setattr(prompt_module, "MANY_KEYS", 0)
    if way == "torch":
        monkeypatch.setattr(prompt_module, "has_flash4", lambda *_: False)
    elif problem := flash4_problem(AttentionCase("cuda", torch.bfloat16, dim)):
        pytest.skip(problem)
    tensors, rows = make_case([count], [length], heads, kv_heads, dim)
    check(TreeDecode(*rows)(*tensors, dim**-0.5), tensors, rows)


@pytest.mark.parametrize("dim", [40, 64, 128, 256])
@pytest.mark.parametrize("seed", range(8))
def test_prompts_among_rows_that_decode_equal_the_formula(seed, dim, monkeypatch):
    """In any order; those of more than 1,500 keys go to FlashAttention 4 where it takes them."""
    monkeypatch.setattr(prompt_module, "MANY_KEYS", 1500)
    rng = np.random.default_rng(seed)
    counts = [*rng.choice([1, 1, 2, 5, 64, 65, 128, 129, 300], int(rng.integers(1, 12))).tolist(), 200]
    rng.shuffle(counts)
    lengths = [count + int(rng.choice([0, 0, 40, 900, 2500])) for count in counts]
    tensors, rows = make_case(counts, lengths, 12, 2, dim)
    check(TreeDecode(*rows)(*tensors, dim**-0.5), tensors, rows)


def test_room_for_more_segments_and_keys_changes_nothing():
    """As in a graph: segments without tokens at the end, and slots behind the last that hold anything."""
    tensors, rows = make_case([1, 200, 3, 100], [70, 200, 40, 500], 28, 4, 128)
    pages, lengths, borders = rows
    chosen = np.array([False, True, False, True])
    cut = cut_segments(pages, lengths, borders, chosen, PAGE)
    nowhere = int(np.setdiff1d(np.arange(len(tensors[1])), pages[:, :1])[-1]) * PAGE + PAGE - 1
    padded = Segments(
        np.concatenate((cut.borders, np.repeat(cut.borders[-1:], 9))),
        np.concatenate((cut.begins, np.zeros(9, np.int32))),
        np.concatenate((cut.seen, np.zeros(9, np.int32))),
        np.concatenate((cut.slots, np.full(300, nowhere, np.int32))),
    )
    tokens = torch.from_numpy(np.repeat(chosen, np.diff(borders)))
    results = [attend_segments(*tensors, DeviceSegments.upload(x, tensors[0].device), 128**-0.5) for x in (cut, padded)]
    check(results[0], tensors, rows, tokens)
    assert torch.equal(results[0][tokens.cuda()], results[1][tokens.cuda()])
