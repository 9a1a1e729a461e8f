from __future__ import annotations

import weakref

import pytest
import torch

from megatron_multiverse.kernels.multiverse_attention import (
    AttentionLayout,
    multiverse_attention,
    multiverse_attention_reference,
    visibility,
)
from megatron_multiverse.model.attention import LayoutParams


def by_reference(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: AttentionLayout) -> torch.Tensor:
    return multiverse_attention_reference(q, k, v, visibility(layout.r))


def softmax_by_hand(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
    """One token, one head at a time, from the formula in the README."""
    out = torch.zeros_like(q)
    group = q.shape[1] // k.shape[1]
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            for i in range(q.shape[2]):
                keys = [j for j in range(k.shape[2]) if visible[b, 0, i, j]]
                scores = torch.stack([q[b, h, i] @ k[b, h // group, j] for j in keys]) * q.shape[-1] ** -0.5
                weights = torch.exp(scores) / torch.exp(scores).sum()
                out[b, h, i] = (weights[:, None] * v[b, h // group, keys]).sum(0)
    return out


@pytest.mark.parametrize("attention", [by_reference, multiverse_attention])
def test_outputs_and_gradients_equal_the_formula_in_float64(attention) -> None:
    generator = torch.Generator().manual_seed(0)
    b, h, g, s, d = 2, 4, 2, 12, 8
    shapes = ((b, h, s, d), (b, g, s, d), (b, g, s, d))
    mine = [torch.randn(x, generator=generator, dtype=torch.float64).requires_grad_() for x in shapes]
    theirs = [x.detach().clone().requires_grad_() for x in mine]
    layout = AttentionLayout(torch.stack([torch.randperm(s, generator=generator) for _ in range(b)]))
    upstream = torch.randn(b, h, s, d, generator=generator, dtype=torch.float64)
    want, got = softmax_by_hand(*theirs, visibility(layout.r)), attention(*mine, layout)
    want.backward(upstream)
    got.backward(upstream)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    for x, y in zip(mine, theirs, strict=True):
        torch.testing.assert_close(x.grad, y.grad, rtol=0, atol=1e-12)


def test_visibility_survives_a_permutation_of_tokens() -> None:
    generator = torch.Generator().manual_seed(1)
    r = torch.randperm(16, generator=generator)[None].int()
    order = torch.randperm(16, generator=generator)
    permuted = visibility(r[:, order], index=order[None])
    assert torch.equal(permuted, visibility(r)[:, :, order][..., order])


def test_visibility_equals_the_structure_package() -> None:
    """Two nested levels and a packed second document, labels by the structure package's own layout."""
    structure = pytest.importorskip("megatron_multiverse.structure")
    texts = ["p", *structure.TAGS, "\n", "1:", "2:", "x"]
    vocab = structure.StructureVocab.from_pieces(texts)
    tag = {name: i + 1 for i, name in enumerate(structure.TAGS)}
    newline, one, two, x = 13, 14, 15, 16

    def path(label: int) -> list[int]:
        return [newline, tag["<Path>"], newline, label, x, newline, tag["</Path>"]]

    def outline(label: int) -> list[int]:
        return [tag["<Outline>"], newline, label, x, newline, tag["</Outline>"], newline]

    block = [
        tag["<Parallel>"], newline, tag["<Goal>"], newline, *outline(one), *outline(two), tag["</Goal>"],
        *path(one), *path(two), newline, tag["<Conclusion>"], newline, x, newline, tag["</Conclusion>"],
        newline, tag["</Parallel>"],
    ]  # fmt: skip
    document = structure.parse([0, *block, x], vocab, prompt_length=1)
    layout = structure.pack_layouts([structure.lay_out(document)] * 2)
    want = torch.from_numpy(structure.visible_matrix(layout))
    got = visibility(torch.from_numpy(layout.r)[None])[0, 0]
    assert torch.equal(got, want)
    assert got.sum() != torch.ones_like(got).tril().sum()


def test_mask_is_built_once_for_all_layers_and_freed_with_the_params() -> None:
    params = LayoutParams.from_labels(torch.arange(6, dtype=torch.int32)[None])
    q = torch.randn(6, 1, 2, 4)
    first = params.attend(q, q, q, layer_number=1, softmax_scale=0.5)
    (plan,) = params.layout._plans.values()
    params.attend(q, q, q, layer_number=2, softmax_scale=0.5)
    assert list(params.layout._plans.values()) == [plan] and plan.mask.dtype == torch.bool
    assert first.shape == (6, 1, 8)
    mask = weakref.ref(plan.mask)
    del plan, params
    assert mask() is None


def test_causal_params_equal_plain_causal_attention() -> None:
    generator = torch.Generator().manual_seed(2)
    q, k, v = (torch.randn(7, 2, 3, 4, generator=generator) for _ in range(3))
    got = LayoutParams.causal(torch.zeros(2, 7)).attend(q, k, v, layer_number=1, softmax_scale=0.5)
    heads = [x.permute(1, 2, 0, 3) for x in (q, k, v)]
    want = torch.nn.functional.scaled_dot_product_attention(*heads, is_causal=True, scale=0.5)
    torch.testing.assert_close(got, want.permute(2, 0, 1, 3).flatten(2))
