"""The fused rotation on a GPU against float64, outputs and gradients, on poisoned memory."""

from __future__ import annotations

import pytest
import torch

from megatron_multiverse.kernels.rope import inverse_frequencies, rope_angles, rope_reference

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float16, 6e-4), (torch.bfloat16, 4e-3)])
@pytest.mark.parametrize(("s", "b", "h", "g", "dim"), [(257, 2, 40, 8, 128), (33, 1, 7, 1, 64), (5, 3, 70, 2, 96)])
def test_rotation_and_gradients_equal_float64(dtype, tolerance, s, b, h, g, dim) -> None:
    from megatron_multiverse.kernels.rope.fused import rope

    generator = torch.Generator("cuda").manual_seed(0)
    ids = torch.randint(0, 131_072, (b, s), generator=generator, device="cuda")
    inv_freq = inverse_frequencies(dim, 1e6, "cuda", torch.float32)
    mixed = torch.randn(s, b, h + 2 * g, dim, generator=generator, device="cuda").to(dtype).requires_grad_()
    upstream = [torch.randn(s, b, n, dim, generator=generator, device="cuda").to(dtype) for n in (h, g)]
    poison = [torch.full((s, b, n, dim), float("nan"), dtype=dtype, device="cuda") for n in (h, g, h, g)]
    del poison
    q, k, _ = mixed.split([h, g, g], dim=2)
    out = rope(q, k, ids, inv_freq)
    torch.autograd.backward(out, upstream)
    angles = rope_angles(ids, inv_freq).double()
    exact = mixed.detach().double().requires_grad_()
    want = [rope_reference(x, angles) for x in exact.split([h, g, g], dim=2)[:2]]
    torch.autograd.backward(want, [x.double() for x in upstream])
    for x, y in zip((*out, mixed.grad), (*want, exact.grad), strict=True):
        x, y = x.detach(), y.detach()
        assert float((x.double() - y).norm() / y.norm()) < tolerance
        assert float((x.double() - y).abs().max()) < 8 * tolerance * float(y.abs().max())
