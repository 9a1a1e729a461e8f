"""The Triton kernels in Triton's CPU interpreter, beside their references. Run as a program: TRITON_INTERPRET must
be set before triton is imported, and the other tests import it without. Float32 and float16 alone: the interpreter
computes wrong products for bfloat16.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"
sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from quick_interpreter import quicken
from random_layouts import random_labels

from megatron_multiverse.kernels.multiverse_attention import tiles, triton_tiles
from megatron_multiverse.kernels.rope import (
    inverse_frequencies,
    rope_angles,
    rope_reference,
    rope_table,
    rotate_qkv_by_table,
    strides,
)
from megatron_multiverse.kernels.rope.triton_qkv import split_and_rotate_triton
from megatron_multiverse.kernels.rope.triton_rotate import rotate_triton

quicken()
torch.set_num_threads(1)


def check_tiles() -> None:
    """Bounds and lists equal the plain ones, odd lengths, padding tiles, permuted tokens and other keys included."""
    for length in (1, 7, 61):
        for permuted in (False, True):
            r, index = torch.stack([random_labels(length, seed) for seed in range(2)]), None
            if permuted:
                order = torch.randperm(length, generator=torch.Generator().manual_seed(length))
                r, index = r[:, order], order.int().expand(2, -1)
            for padded in (0, 40 * (length // 40 + 1)):
                want = tiles.tile_bounds_reference(r, index, size=8, length=padded)
                got = triton_tiles.tile_bounds_triton(r, index, size=8, length=padded)
                for name in ("r_low", "r_high", "index_low", "index_high"):
                    a, b = getattr(want, name), getattr(got, name)
                    assert (a is None and b is None) or torch.equal(a, b), name
                lists = triton_tiles.tile_lists_triton(got)
                assert lists.difference(tiles.tile_lists_reference(want)) is None, length
                short = tiles.tile_bounds_reference(r, index, size=5, length=padded)
                got = triton_tiles.tile_bounds_triton(r, index, size=5, length=padded)
                assert torch.equal(got.r_low, short.r_low) and torch.equal(got.r_high, short.r_high)
                lists = triton_tiles.tile_lists_triton(short, want)
                assert lists.difference(tiles.tile_lists_reference(short, want)) is None, length
            if permuted and length > 1:
                local, places = r[:, : length // 3], index[:, : length // 3]
                queries = tiles.tile_bounds_reference(local, places, size=8, length=24)
                lists = triton_tiles.tile_lists_triton(queries, want)
                assert lists.difference(tiles.tile_lists_reference(queries, want)) is None, length


def check_rope() -> None:
    """Outputs and both gradients equal the reference in float64, also for views with odd strides."""
    generator = torch.Generator().manual_seed(0)
    for s, b, h, g, dim in ((5, 2, 3, 1, 8), (3, 1, 4, 4, 12), (2, 1, 70, 2, 16)):
        ids = torch.randint(0, 100_000, (b, s), generator=generator)
        inv_freq = inverse_frequencies(dim, 1e6, "cpu", torch.float32)
        mixed = torch.randn(s, b, h + g, dim + 4, generator=generator).requires_grad_()
        q, k = mixed[..., :dim].split([h, g], dim=2)
        out = rotate_triton(q, k, rope_table(ids, inv_freq))
        angles = rope_angles(ids, inv_freq).double()
        exact = mixed.detach().double().requires_grad_()
        want = [rope_reference(x, angles) for x in exact[..., :dim].split([h, g], dim=2)]
        upstream = [torch.randn(x.shape, generator=generator) for x in out]
        torch.autograd.backward(out, upstream)
        torch.autograd.backward(want, [x.double() for x in upstream])
        for x, y in zip(out, want, strict=True):
            torch.testing.assert_close(x.double(), y, rtol=0, atol=2e-6)
        torch.testing.assert_close(mixed.grad.double(), exact.grad, rtol=0, atol=2e-6)
        halves = rotate_triton(q.detach().half(), k.detach().half(), rope_table(ids, inv_freq))
        for x, y in zip(halves, want, strict=True):
            torch.testing.assert_close(x.double(), y, rtol=2e-3, atol=4e-3)


def check_rope_qkv() -> None:
    """The fused split equals the plain one in float64, outputs and the gradient of the mixed projection; gradients
    may come in any layout."""
    generator = torch.Generator().manual_seed(0)
    for s, b, g, per_group, dim in ((5, 2, 2, 3, 8), (3, 1, 4, 1, 12), (2, 3, 1, 70, 16)):
        ids = torch.randint(0, 131_072, (b, s), generator=generator)
        table = rope_table(ids, inverse_frequencies(dim, 1e6, "cpu", torch.float32))
        mixed = torch.randn(s, b, g, (per_group + 2) * dim, generator=generator).requires_grad_()
        out = split_and_rotate_triton(mixed, table)
        exact = mixed.detach().double().requires_grad_()
        want = rotate_qkv_by_table(exact, table.double())
        upstream = [torch.randn(*x.shape[2:], s, b, generator=generator).permute(2, 3, 0, 1) for x in out]
        upstream[1] = upstream[1].contiguous()
        torch.autograd.backward(out, upstream)
        torch.autograd.backward(want, [x.double() for x in upstream])
        for x, y in zip((*out, mixed.grad), (*want, exact.grad), strict=True):
            assert x.is_contiguous() and x.shape == y.shape
            torch.testing.assert_close(x.double(), y, rtol=0, atol=2e-6)
        halves = split_and_rotate_triton(mixed.detach().half(), table)
        for x, y in zip(halves, want, strict=True):
            torch.testing.assert_close(x.double(), y, rtol=2e-3, atol=4e-3)


def check_far_heads() -> None:
    """With a limit that these strides break, the kernels get copies, and the results are those of dense tensors."""
    generator = torch.Generator().manual_seed(0)
    inv_freq = inverse_frequencies(8, 1e6, "cpu", torch.float32)
    table = rope_table(torch.arange(5)[None], inv_freq)
    # heads in front of tokens: heads are far apart
    q, k = (torch.randn(heads, 5, 1, 8, generator=generator).permute(1, 2, 0, 3) for heads in (4, 2))
    mixed = torch.randn(2, 5, 1, 32, generator=generator).permute(1, 2, 0, 3)
    want = (*rotate_triton(q, k, table), *split_and_rotate_triton(mixed, table))
    limit, strides.MAX_OFFSET = strides.MAX_OFFSET, 40
    try:
        assert not any(map(strides.heads_fit, (q, k, mixed))) and strides.heads_fit(k.contiguous())
        got = (*rotate_triton(q, k, table), *split_and_rotate_triton(mixed, table))
    finally:
        strides.MAX_OFFSET = limit
    assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))


if __name__ == "__main__":
    for check in (check_tiles, check_rope, check_rope_qkv, check_far_heads):
        check()
        print(check.__name__)
