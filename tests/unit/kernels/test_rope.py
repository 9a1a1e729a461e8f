"""The table form of the rotation, which CPU and float64 models can use, against the definition."""

from __future__ import annotations

import pytest
import torch

from megatron_multiverse.kernels.rope import (
    inverse_frequencies,
    rope_angles,
    rope_reference,
    rope_table,
    rotate_by_table,
    strides,
)


def test_rotation_by_table_equals_the_reference() -> None:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 50_000, (2, 5), generator=generator)
    inv_freq = inverse_frequencies(16, 1e6, "cpu", torch.float64)
    x = torch.randn(5, 2, 3, 16, generator=generator, dtype=torch.float64)
    got = rotate_by_table(x, rope_table(ids, inv_freq))
    torch.testing.assert_close(got, rope_reference(x, rope_angles(ids, inv_freq)), rtol=0, atol=1e-12)
    assert not torch.allclose(got, x)


def test_backward_is_the_rotation_by_the_negative_angle() -> None:
    ids = torch.tensor([[3, 3, 9]])
    cosines = rope_table(ids, inverse_frequencies(8, 1e4, "cpu", torch.float64))
    x = torch.randn(3, 1, 2, 8, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn_like(x)
    rotate_by_table(x, cosines).backward(upstream)
    cos, sin = cosines.chunk(2, dim=-1)
    torch.testing.assert_close(x.grad, rotate_by_table(upstream, torch.cat((cos, -sin), dim=-1)))


@pytest.mark.parametrize(("stride", "fits"), [(8, True), ((2**31 - 8) // 3, True), ((2**31 - 8) // 3 + 1, False)])
def test_heads_further_apart_than_int32_are_copied_together(stride: int, fits: bool) -> None:
    """On the meta device, which has strides and no memory."""
    x = torch.empty_strided((2, 1, 4, 8), (2**33, 2**33, stride, 1), dtype=torch.bfloat16, device="meta")
    assert (3 * stride + 7 <= 2**31 - 1) == fits
    assert strides.heads_fit(x) == fits
    assert (strides.with_near_heads(x) is x) == fits
    assert strides.heads_fit(strides.with_near_heads(x))


def test_elements_of_a_head_that_are_apart_are_copied_together() -> None:
    x = torch.randn(2, 1, 8, 4).transpose(2, 3)
    assert not strides.heads_fit(x) and strides.with_near_heads(x).is_contiguous()
