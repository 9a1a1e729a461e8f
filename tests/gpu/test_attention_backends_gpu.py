"""Fast attention backends on a GPU against float64 by explicit matrices."""

from __future__ import annotations

import random

import pytest
import torch
from random_layouts import random_labels

from megatron_multiverse.kernels.multiverse_attention import (
    flash4_problem,
    multiverse_attention_reference,
    tiles,
    visibility,
)
from megatron_multiverse.model.backends import AttentionBackend, select_backend

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]

BF16, FP16 = torch.bfloat16, torch.float16
TOLERANCE = {BF16: 1e-2, FP16: 2e-3}


def backend_or_skip(name: str, dtype: torch.dtype, dim: int) -> AttentionBackend:
    if name == "flash4" and (problem := flash4_problem("cuda", dtype, dim)):
        pytest.skip(problem)
    return select_backend(name, "cuda", dtype, dim)


def draw(s: int, b: int, heads: int, dim: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """[b, heads, s, dim] as a view of [s, b, heads, dim], as megatron-core hands it over."""
    generator = torch.Generator("cuda").manual_seed(seed)
    x = torch.randn(s, b, heads, dim, generator=generator, device="cuda").to(dtype)
    return x.permute(1, 2, 0, 3)


def poison(like: list[torch.Tensor]) -> None:
    """Leave NaN in the memory that the next allocations of these sizes get."""
    stale = [torch.full_like(x, float("nan")) for x in like for _ in range(3)]
    del stale


def check(name, r, index, h, g, dim, dtype, seed) -> None:
    backend = backend_or_skip(name, dtype, dim)
    b, s = r.shape
    inputs = [draw(s, b, heads, dim, dtype, seed + n).requires_grad_() for n, heads in enumerate((h, g, g))]
    upstream = draw(s, b, h, dim, dtype, seed + 3)
    plan = backend.prepare(r, index, dtype, None)
    poison([*inputs, upstream])
    out = backend.attend(*inputs, plan, None)
    grads = torch.autograd.grad(out, inputs, upstream)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    want = multiverse_attention_reference(*exact, visibility(r, index))
    want_grads = torch.autograd.grad(want, exact, upstream.double())
    for kind, x, y in zip(("out", "dq", "dk", "dv"), (out, *grads), (want, *want_grads), strict=True):
        x, y = x.detach(), y.detach()
        error = float((x.double() - y).norm() / y.norm())
        scale = float(y.abs().max())
        if scale > 1e-6:  # of a single token dq and dk are 0
            assert error < TOLERANCE[dtype], (kind, s, seed, error)
        worst = float((x.double() - y).abs().max())
        assert worst < 6 * TOLERANCE[dtype] * max(scale, 1.0), (kind, s, seed, worst)


def labels(s: int, b: int, seed: int) -> torch.Tensor:
    return torch.stack([random_labels(s, seed + n) for n in range(b)]).cuda()


LENGTHS = [1, 2, 127, 128, 129, 255, 640]


@pytest.mark.parametrize(("h", "g", "dim", "dtype"), [(8, 2, 128, BF16), (4, 4, 64, FP16)])
def test_flash4_equals_float64_on_random_trees(h, g, dim, dtype) -> None:
    rng = random.Random(dim)
    for seed in range(110):
        s = LENGTHS[seed] if seed < len(LENGTHS) else rng.randint(1, 1100)
        check("flash4", labels(s, 1 + seed % 2, seed), None, h, g, dim, dtype, seed)


def test_flex_equals_float64_on_random_trees() -> None:
    """One bucket, so one compilation."""
    rng = random.Random(0)
    for seed in range(40):
        check("flex", labels(rng.randint(897, 1024), 2, seed), None, 8, 2, 64, BF16, seed)


@pytest.mark.parametrize(("name", "dim"), [("flash4", 128), ("flex", 64)])
def test_permuted_tokens(name, dim) -> None:
    for seed in range(10):
        order = torch.randperm(1000, generator=torch.Generator().manual_seed(seed))
        if seed % 2:  # chunks in another order, as context parallelism deals them out
            order = torch.cat(torch.arange(1000).chunk(7)[::-1])
        r, index = labels(1000, 2, seed)[:, order.cuda()], order.int().cuda().expand(2, -1)
        check(name, r, index, 8, 2, dim, BF16, seed)


@pytest.mark.parametrize(("name", "dim"), [("flash4", 128), ("flex", 64)])
def test_no_hidden_key_gets_a_gradient_and_every_visible_one_does(name, dim) -> None:
    backend = backend_or_skip(name, BF16, dim)
    for seed in range(12):
        s = 1000 - seed
        r = labels(s, 2, seed)
        q, k, v = (draw(s, 2, heads, dim, BF16, seed + n).requires_grad_() for n, heads in enumerate((8, 2, 2)))
        out = backend.attend(q, k, v, backend.prepare(r, None, BF16, None), None)
        query = random.Random(seed).randrange(s // 2, s)
        upstream = torch.zeros_like(out)
        upstream[:, :, query] = 1
        (dv,) = torch.autograd.grad(out, v, upstream)
        got = dv.abs().sum(-1) > 0  # [b, g, s]
        assert torch.equal(got, visibility(r)[:, :, query].expand_as(got))


def test_other_lengths_and_layouts_do_not_compile_flex_again() -> None:
    backend = backend_or_skip("flex", BF16, 64)
    counters = torch._dynamo.utils.counters["stats"]
    seen = []
    for s in (1000, 999, 901):
        q, k, v = (draw(s, 2, heads, 64, BF16, heads).requires_grad_() for heads in (8, 2, 2))
        backend.attend(q, k, v, backend.prepare(labels(s, 2, s), None, BF16, None), None).sum().backward()
        seen.append(counters["unique_graphs"])
    assert seen[1:] == seen[:1] * 2


@pytest.mark.parametrize("s", [1, 300, 32768 + 5, 131072])
@pytest.mark.parametrize("permuted", [False, True])
def test_tile_lists_equal_the_plain_ones(s, permuted) -> None:
    b = 2 if s < 1000 else 1
    r, index = labels(s, b, s), None
    if permuted:
        order = torch.cat(torch.arange(s).chunk(8)[::-1]).cuda()
        r, index = r[:, order], order.int().expand(b, -1)
    stale = torch.full((4 * b * (s // 128 + 1) ** 2,), -1, dtype=torch.int32, device="cuda")
    del stale
    got = tiles.tile_lists(r, index)
    want = tiles.tile_lists_reference(tiles.tile_bounds_reference(r, index))
    for name in ("q_partial", "q_full", "k_partial", "k_full"):
        assert torch.equal(getattr(got, name).counts, getattr(want, name).counts)
        assert torch.equal(getattr(got, name).indices, getattr(want, name).indices)


def test_preparing_does_not_wait_for_the_device() -> None:
    backend = backend_or_skip("flash4", BF16, 128)
    r = labels(1000, 1, 0)
    backend.prepare(r, None, BF16, None)
    torch.cuda.set_sync_debug_mode("error")
    try:
        backend.prepare(r, None, BF16, None)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_training_losses_agree_across_backends() -> None:
    """A small model in bfloat16, 50 steps: flash4 and flex follow dense within 0.5 % of the first
    loss for 20 steps and within 4 % for 50, and the loss halves.
    """
    pytest.importorskip("megatron.core")
    from megatron_multiverse.model.attention import LayoutParams
    from megatron_multiverse.model.families import qwen3
    from megatron_multiverse.model.gpt import build_gpt_model

    config = qwen3(
        num_layers=2, hidden_size=256, ffn_hidden_size=512, num_attention_heads=8, num_query_groups=2, kv_channels=64,
        vocab_size=128, max_sequence_length=512,
    )  # fmt: skip
    names = ["dense", "flex"] + ["flash4"] * (flash4_problem("cuda", BF16, 64) is None)
    curves = {}
    for name in names:
        model = build_gpt_model(config, dtype=BF16, device="cuda", seed=1)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        losses = []
        for step in range(50):
            generator = torch.Generator().manual_seed(step % 4)
            ids = torch.randint(0, 128, (2, 384), generator=generator).cuda()
            positions = torch.arange(384).expand(2, -1).cuda()
            params = LayoutParams(r=labels(384, 2, step % 4), backend=name)
            loss = model(ids, positions, None, packed_seq_params=params, labels=ids.roll(-1, 1)).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        curves[name] = torch.stack(losses).float()
    first, last = curves["dense"][0], curves["dense"][-1]
    for name in names[1:]:
        difference = (curves[name] - curves["dense"]).abs() / first
        print(f"{name}: largest difference {difference[:20].max():.4f}, later {difference.max():.4f} of {first:.3f}")
        assert difference[:20].max() < 0.005
        assert difference.max() < 0.04  # rounding differences grow once the batches are learned by heart
    assert last < 0.5 * first
