"""tree_decode and kv_copy against the formulas of their READMEs, written as loops."""

from __future__ import annotations

import pytest
import torch

from megatron_multiverse.kernels.kv_copy import copy_slots
from megatron_multiverse.kernels.tree_decode import tree_decode


def by_loops(query, keys, values, table, visible, scale):
    rows, q, heads, _ = query.shape
    group = heads // keys.shape[1]
    out = torch.zeros_like(query)
    for b in range(rows):
        for i in range(q):
            slots = table[b][visible[b, i]]
            for h in range(heads):
                scores = (keys[slots, h // group] @ query[b, i, h]) * scale
                out[b, i, h] = scores.softmax(0) @ values[slots, h // group]
    return out


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (8, 1)])
@pytest.mark.parametrize("q", [1, 5])
def test_equals_the_formula(heads, kv_heads, q):
    generator = torch.Generator().manual_seed(heads * q)
    keys, values = (torch.randn(40, kv_heads, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    query = torch.randn(3, q, heads, 8, generator=generator, dtype=torch.float64)
    table = torch.stack([torch.randperm(40, generator=generator)[:20] for _ in range(3)])
    lengths = torch.tensor([20, 7, q])
    visible = torch.arange(20) <= (lengths[:, None] - q + torch.arange(q))[:, :, None]
    got = tree_decode(query, keys, values, table, visible, 0.3)
    torch.testing.assert_close(got, by_loops(query, keys, values, table, visible, 0.3), atol=1e-12, rtol=0)


def test_the_order_of_slots_and_hidden_slots_do_not_matter():
    generator = torch.Generator().manual_seed(0)
    keys, values = (torch.randn(30, 2, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    query = torch.randn(1, 1, 4, 8, generator=generator, dtype=torch.float64)
    table = torch.arange(10)[None]
    everything = torch.ones(1, 1, 10, dtype=torch.bool)
    expected = tree_decode(query, keys, values, table, everything, 1.0)
    shuffled = tree_decode(query, keys, values, table[:, torch.randperm(10, generator=generator)], everything, 1.0)
    torch.testing.assert_close(shuffled, expected, atol=1e-12, rtol=0)
    padded = torch.cat([table, torch.full((1, 6), 29)], 1)
    hidden = torch.arange(16)[None, None] < 10
    torch.testing.assert_close(tree_decode(query, keys, values, padded, hidden, 1.0), expected, atol=1e-12, rtol=0)


def test_copies_read_everything_before_they_write():
    keys = torch.arange(24.0).view(2, 4, 3, 1)
    values = -keys
    copy_slots(keys, values, torch.tensor([0, 1]), torch.tensor([1, 3]))
    assert keys[0, :, 0, 0].tolist() == [0.0, 0.0, 6.0, 3.0]
    assert keys[1, :, 2, 0].tolist() == [14.0, 14.0, 20.0, 17.0]
    assert torch.equal(values, -keys)
