"""The fused rotation on a GPU against float64, outputs and gradients, on poisoned memory."""

from __future__ import annotations

import pytest
import torch

from megatron_multiverse.kernels.rope import (
    inverse_frequencies,
    rope_angles,
    rope_reference,
    rope_table,
    rotate_qkv_by_table,
)

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float16, 6e-4), (torch.bfloat16, 4e-3)])
@pytest.mark.parametrize(("s", "b", "h", "g", "dim"), [(257, 2, 40, 8, 128), (33, 1, 7, 1, 64), (5, 3, 70, 2, 96)])
def test_rotation_and_gradients_equal_float64(dtype, tolerance, s, b, h, g, dim) -> None:
    from megatron_multiverse.kernels.rope.triton_rotate import rotate_triton

    generator = torch.Generator("cuda").manual_seed(0)
    ids = torch.randint(0, 131_072, (b, s), generator=generator, device="cuda")
    inv_freq = inverse_frequencies(dim, 1e6, "cuda", torch.float32)
    mixed = torch.randn(s, b, h + 2 * g, dim, generator=generator, device="cuda").to(dtype).requires_grad_()
    upstream = [torch.randn(s, b, n, dim, generator=generator, device="cuda").to(dtype) for n in (h, g)]
    poison = [torch.full((s, b, n, dim), float("nan"), dtype=dtype, device="cuda") for n in (h, g, h, g)]
    del poison
    q, k, _ = mixed.split([h, g, g], dim=2)
    out = rotate_triton(q, k, rope_table(ids, inv_freq))
    torch.autograd.backward(out, upstream)
    angles = rope_angles(ids, inv_freq).double()
    exact = mixed.detach().double().requires_grad_()
    want = [rope_reference(x, angles) for x in exact.split([h, g, g], dim=2)[:2]]
    torch.autograd.backward(want, [x.double() for x in upstream])
    for x, y in zip((*out, mixed.grad), (*want, exact.grad), strict=True):
        x, y = x.detach(), y.detach()
        assert float((x.double() - y).norm() / y.norm()) < tolerance
        assert float((x.double() - y).abs().max()) < 8 * tolerance * float(y.abs().max())


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float16, 6e-4), (torch.bfloat16, 4e-3)])
@pytest.mark.parametrize(
    ("s", "b", "g", "per_group", "dim"), [(257, 2, 8, 5, 128), (33, 1, 4, 7, 128), (5, 3, 1, 70, 96), (64, 2, 3, 1, 64)]
)
def test_fused_split_and_its_gradient_equal_float64(dtype, tolerance, s, b, g, per_group, dim) -> None:
    from megatron_multiverse.kernels.rope.triton_qkv import split_and_rotate_triton

    generator = torch.Generator("cuda").manual_seed(0)
    ids = torch.randint(0, 131_072, (b, s), generator=generator, device="cuda")
    table = rope_table(ids, inverse_frequencies(dim, 1e6, "cuda", torch.float32))
    width = (per_group + 2) * dim
    mixed = torch.randn(s, b, g, width, generator=generator, device="cuda").to(dtype).requires_grad_()
    # Gradients as attention hands them over: permuted views of [b, heads, s, dim].
    upstream = [
        torch.randn(b, n, s, dim, generator=generator, device="cuda").to(dtype).permute(2, 0, 1, 3)
        for n in (g * per_group, g, g)
    ]
    poison = [torch.full((s, b, n, dim), float("nan"), dtype=dtype, device="cuda") for n in (g * per_group, g, g)]
    poison += [torch.full_like(mixed, float("nan"))]
    del poison
    out = split_and_rotate_triton(mixed, table)
    torch.autograd.backward(out, upstream)
    exact = mixed.detach().double().requires_grad_()
    want = rotate_qkv_by_table(exact, table.double())
    torch.autograd.backward(want, [x.double() for x in upstream])
    for x, y in zip((*out, mixed.grad), (*want, exact.grad), strict=True):
        x, y = x.detach(), y.detach()
        assert float((x.double() - y).norm() / y.norm()) < tolerance
        assert float((x.double() - y).abs().max()) < 8 * tolerance * float(y.abs().max())
