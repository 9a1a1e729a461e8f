"""Fast attention backends on a GPU against float64 by explicit matrices.

Compiling takes most of the time; with pytest-xdist four processes share it: `pytest -m gpu -n 4` on this file.
"""

from __future__ import annotations

import contextlib
import os
import random

import pytest
import torch

from megatron_multiverse.kernels.multiverse_attention import (
    BACKENDS,
    AttentionCase,
    AttentionLayout,
    choose_backend,
    flash4,
    multiverse_attention,
    multiverse_attention_reference,
    tile_lists,
    tiles,
    visibility,
)
from megatron_multiverse.kernels.structure_scan import structure_scan
from tests.random_layouts import random_labels
from tests.random_tags import TAG_IDS, random_pack

if torch.cuda.is_available():
    # Before torch loads its cuDNN: megatron-core imports TransformerEngine, which fails on symbols of another one then.
    with contextlib.suppress(ImportError):
        import megatron.core  # noqa: F401

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]

BF16, FP16 = torch.bfloat16, torch.float16
TOLERANCE = {BF16: 1e-2, FP16: 2e-3}


MAY_LACK_FLASH4 = os.environ.get("MULTIVERSE_WITHOUT_FLASH4") == "1"
"""On Hopper a broken installation of flash-attn-4 fails these tests, unless this says that it is not there."""


def skip_unless(name: str, dtype: torch.dtype, dim: int) -> None:
    if name == "auto":
        return
    case = AttentionCase("cuda", dtype, dim)
    problem = BACKENDS[name].problem(case)
    if problem and name == "flash4" and (MAY_LACK_FLASH4 or torch.cuda.get_device_capability()[0] != 9):
        pytest.skip(problem)
    choose_backend(name, case)


def draw(s: int, b: int, heads: int, dim: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """[b, heads, s, dim] as a view of [s, b, heads, dim], as megatron-core hands it over."""
    generator = torch.Generator("cuda").manual_seed(seed)
    x = torch.randn(s, b, heads, dim, generator=generator, device="cuda").to(dtype)
    return x.permute(1, 2, 0, 3)


def poison(*like: torch.Tensor) -> None:
    """Leave NaN, or -1 in integers, in the memory that the next allocations of these sizes get."""
    stale = [torch.full_like(x, float("nan") if x.is_floating_point() else -1) for x in like for _ in range(3)]
    del stale


def poison_lists(layout: AttentionLayout) -> None:
    """Entries of lists after their counts are unspecified: make them absurd."""
    b, *lengths = layout.shape
    rows, columns = (-(-s // tiles.TILE) + 1 for s in lengths)
    stale = [torch.full((size,), 10**8, dtype=torch.int32, device="cuda") for size in (rows * columns * b * 2,) * 4]
    del stale


def compare(got, want, dtype, note) -> None:
    for kind, x, y in zip(("out", "dq", "dk", "dv"), got, want, strict=True):
        x, y = x.detach(), y.detach()
        assert not x.isnan().any(), (kind, note)
        error = float((x.double() - y).norm() / y.norm().clamp_min(1e-30))
        scale = float(y.abs().max())
        if scale > 1e-6:  # of a single token dq and dk are 0
            assert error < TOLERANCE[dtype], (kind, note, error)
        worst = float((x.double() - y).abs().max())
        assert worst < 6 * TOLERANCE[dtype] * max(scale, 1.0), (kind, note, worst)


def check(name, layout: AttentionLayout, h, g, dim, dtype, seed, scale=None) -> None:
    """Output and all gradients against float64 by explicit matrices."""
    skip_unless(name, dtype, dim)
    b, s_q, s_k = layout.shape
    sizes = ((s_q, h), (s_k, g), (s_k, g))
    inputs = [draw(s, b, heads, dim, dtype, seed + n).requires_grad_() for n, (s, heads) in enumerate(sizes)]
    upstream = draw(s_q, b, h, dim, dtype, seed + 3)
    poison_lists(layout)
    poison(*inputs, upstream)
    out = multiverse_attention(*inputs, layout, softmax_scale=scale, backend=name)
    grads = torch.autograd.grad(out, inputs, upstream)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    visible = visibility(layout.r, layout.index, layout.key_r, layout.key_index)
    want = multiverse_attention_reference(*exact, visible, scale)
    want_grads = torch.autograd.grad(want, exact, upstream.double())
    compare((out, *grads), (want, *want_grads), dtype, (layout.shape, seed))
    lonely = ~visible.any(-1)[:, 0]  # [b, s_q]
    assert not out.detach().transpose(1, 2)[lonely].any()


def labels(s: int, b: int, seed: int) -> torch.Tensor:
    return torch.stack([random_labels(s, seed + n) for n in range(b)]).cuda()


LENGTHS = [1, 2, 127, 128, 129, 255, 640]


# Kernels are compiled for each width, dtype, grouping and rule, and for sequences of one tile: few kinds, many inputs.
@pytest.mark.parametrize(("h", "g", "dim", "dtype"), [(8, 2, 128, BF16), (4, 4, 64, FP16)])
def test_flash4_equals_float64_on_random_trees(h, g, dim, dtype) -> None:
    rng = random.Random(dim)
    for seed in range(110):
        s = LENGTHS[seed] if seed < len(LENGTHS) and dim == 128 else rng.randint(129, 1100)
        check("flash4", AttentionLayout(labels(s, 2, seed)), h, g, dim, dtype, seed)


@pytest.mark.parametrize(("h", "g", "dim", "dtype"), [(4, 4, 64, BF16), (4, 1, 128, FP16), (8, 2, 64, FP16)])
def test_flash4_takes_other_widths_and_dtypes(h, g, dim, dtype) -> None:
    """A single tile among the lengths, and tokens in any order."""
    for seed, s in enumerate((100, 128, 700)):
        check("flash4", AttentionLayout(labels(s, 2, seed)), h, g, dim, dtype, seed)
    check("flash4", AttentionLayout(*shuffled(700, 1)), h, g, dim, dtype, 1)


@pytest.mark.parametrize("name", ["flash4", "flex", "dense"])
def test_the_scale_of_the_scores_is_taken(name) -> None:
    check(name, AttentionLayout(labels(1000, 2, 1)), 8, 2, 64, BF16, 1, scale=0.3)


def test_flash4_takes_groups_that_do_not_divide_a_tile() -> None:
    for seed in range(4):
        check("flash4", AttentionLayout(labels(500 + 60 * seed, 2, seed)), 10, 2, 128, BF16, seed)


def test_flex_equals_float64_on_random_trees() -> None:
    """One bucket, so one compilation."""
    rng = random.Random(0)
    for seed in range(40):
        check("flex", AttentionLayout(labels(rng.randint(897, 1024), 2, seed)), 8, 2, 64, BF16, seed)


KINDS = [("flash4", 128), ("flex", 64), ("dense", 64)]


def shuffled(s: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Labels and places [2, s] of tokens in random order or, as context parallelism deals them out, in chunks."""
    order = torch.randperm(s, generator=torch.Generator().manual_seed(seed))
    if seed % 2:
        order = torch.cat(torch.arange(s).chunk(7)[::-1])
    return labels(s, 2, seed)[:, order.cuda()], order.int().cuda().expand(2, -1)


@pytest.mark.parametrize(("name", "dim"), KINDS)
def test_permuted_tokens(name, dim) -> None:
    for seed in range(10):
        check(name, AttentionLayout(*shuffled(1000, seed)), 8, 2, dim, BF16, seed)


@pytest.mark.parametrize(("name", "dim"), KINDS)
def test_local_queries_see_all_keys(name, dim) -> None:
    """Context parallelism: a slice of the queries against all keys."""
    for seed in range(10):
        r, index = shuffled(1000, seed)
        part = slice(143 * (seed % 6), 143 * (seed % 6) + 200)
        check(name, AttentionLayout(r[:, part], index[:, part], r, index), 8, 2, dim, BF16, seed)


@pytest.mark.parametrize(("name", "dim"), KINDS)
def test_queries_that_see_nothing_get_zeros(name, dim) -> None:
    """The first queries of a sequence against its middle: whole tiles see nothing."""
    for seed in range(3):
        r, places = labels(1000, 2, seed), torch.arange(1000, device="cuda", dtype=torch.int32).expand(2, -1)
        queries, keys = slice(0, 900), slice(300, 800)
        layout = AttentionLayout(r[:, queries], places[:, queries], r[:, keys], places[:, keys])
        assert not visibility(layout.r, layout.index, layout.key_r, layout.key_index)[:, :, :300].any()
        check(name, layout, 8, 2, dim, BF16, seed)


@pytest.mark.parametrize(("name", "dim"), [("flash4", 128), ("flex", 64)])
def test_lists_of_a_scan_are_used_and_right(name, dim) -> None:
    """The scan's own lists; those of other labels give another result."""
    for seed in range(3):
        pack = random_pack(seed, depth=3)
        ids, spans = pack.ids[None, :1024].cuda(), pack.documents[None].cuda()
        ids = torch.nn.functional.pad(ids, (0, 1024 - ids.shape[1]), value=40)
        scan = structure_scan(ids, spans, torch.tensor(TAG_IDS, device="cuda"))
        check(name, AttentionLayout(scan.r, lists=scan.lists), 8, 2, dim, BF16, seed)
    r, none = torch.arange(1024, device="cuda")[None], torch.arange(1024, 0, -1, device="cuda")[None]
    q, k, v = (draw(1024, 1, heads, dim, BF16, heads) for heads in (8, 2, 2))
    right, wrong = (
        multiverse_attention(q, k, v, AttentionLayout(r, lists=tile_lists(x)), backend=name) for x in (r, none)
    )
    assert (right[:, :, 256:] - wrong[:, :, 256:]).abs().max() > 0.1


@contextlib.contextmanager
def deterministic():
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    ("h", "g", "dim", "dtype"), [(8, 2, 128, BF16), (10, 2, 128, BF16), (4, 4, 64, BF16), (4, 1, 64, FP16)]
)
def test_deterministic_gradients_are_the_same_bits_in_every_run(h, g, dim, dtype) -> None:
    skip_unless("flash4", dtype, dim)
    with deterministic():
        for seed in range(3):
            check("flash4", AttentionLayout(labels(700 + 100 * seed, 2, seed)), h, g, dim, dtype, seed)
        r = labels(8192, 2, 5)
        inputs = [draw(8192, 2, heads, dim, dtype, heads).requires_grad_() for heads in (h, g, g)]
        upstream = draw(8192, 2, h, dim, dtype, 9)
        runs = []
        for _ in range(5):
            out = multiverse_attention(*inputs, AttentionLayout(r), backend="auto")
            runs.append((out, *torch.autograd.grad(out, inputs, upstream)))
        for run in runs[1:]:
            assert all(torch.equal(x, y) for x, y in zip(run, runs[0], strict=True))


def test_deterministic_attention_of_tokens_in_any_order_takes_flex() -> None:
    with deterministic():
        check("auto", AttentionLayout(*shuffled(1000, 1)), 8, 2, 64, BF16, 1)


def test_131072_tokens() -> None:
    """Forward and backward of 128K tokens. Rows of the output and of dq are checked alone; for dk and dv the upstream
    gradient is zero but on those rows, which leaves them a sum over few queries."""
    skip_unless("flash4", BF16, 128)
    b, s, h, g, dim = 2, 131072, 4, 1, 128
    r = labels(s, b, 3)
    inputs = [draw(s, b, heads, dim, BF16, heads + n).requires_grad_() for n, heads in enumerate((h, g, g))]
    rows = torch.tensor([0, 1, 77, 128, 40000, 65535, 65536, 99999, s - 129, s - 1], device="cuda")
    upstream = torch.zeros(b, h, s, dim, dtype=BF16, device="cuda")
    upstream[:, :, rows] = draw(len(rows), b, h, dim, BF16, 8)
    out = multiverse_attention(*inputs, AttentionLayout(r), backend="flash4")
    dq, dk, dv = torch.autograd.grad(out, inputs, upstream)
    q, k, v = (x.detach().float() for x in inputs)
    q, k, v = q[:, :, rows].requires_grad_(), k.requires_grad_(), v.requires_grad_()
    places = torch.arange(s, device="cuda").expand(b, -1)
    want = multiverse_attention_reference(q, k, v, visibility(r[:, rows], places[:, rows], r, places))
    want_grads = torch.autograd.grad(want, (q, k, v), upstream[:, :, rows].float())
    compare((out[:, :, rows], dq[:, :, rows], dk, dv), (want, *want_grads), BF16, "128K")
    rest = torch.ones(s, dtype=torch.bool, device="cuda")
    rest[rows] = False
    assert not dq[:, :, rest].any()


@pytest.mark.parametrize(("name", "dim"), [("flash4", 128), ("flex", 64)])
def test_no_hidden_key_gets_a_gradient_and_every_visible_one_does(name, dim) -> None:
    skip_unless(name, BF16, dim)
    for seed in range(12):
        s = 1000 - seed
        r = labels(s, 2, seed)
        q, k, v = (draw(s, 2, heads, dim, BF16, seed + n).requires_grad_() for n, heads in enumerate((8, 2, 2)))
        out = multiverse_attention(q, k, v, AttentionLayout(r), backend=name)
        query = random.Random(seed).randrange(s // 2, s)
        upstream = torch.zeros_like(out)
        upstream[:, :, query] = 1
        (dv,) = torch.autograd.grad(out, v, upstream)
        got = dv.abs().sum(-1) > 0  # [b, g, s]
        assert torch.equal(got, visibility(r)[:, :, query].expand_as(got))


def test_other_lengths_and_layouts_do_not_compile_flex_again() -> None:
    skip_unless("flex", BF16, 64)
    counters = torch._dynamo.utils.counters["stats"]
    seen = []
    for s in (1000, 999, 901):
        q, k, v = (draw(s, 2, heads, 64, BF16, heads).requires_grad_() for heads in (8, 2, 2))
        multiverse_attention(q, k, v, AttentionLayout(labels(s, 2, s)), backend="flex").sum().backward()
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
    keys = tiles.tile_bounds_reference(r, index)
    assert tile_lists(r, index).difference(tiles.tile_lists_reference(keys)) is None
    short = tiles.tile_bounds_reference(r, index, size=80)
    assert tile_lists(r, index, query_size=80).difference(tiles.tile_lists_reference(short, keys)) is None


def test_preparing_flash4_does_not_wait_for_the_device() -> None:
    skip_unless("flash4", BF16, 128)
    case, r = AttentionCase("cuda", BF16, 128), labels(1000, 1, 0)
    assert flash4.flash4_plan(AttentionLayout(r), case).backward is not None
    torch.cuda.set_sync_debug_mode("error")
    try:
        assert flash4.flash4_plan(AttentionLayout(r), case).backward is not None
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
    names = ["dense", "flex"] + ["flash4"] * (BACKENDS["flash4"].problem(AttentionCase("cuda", BF16, 64)) is None)
    curves = {}
    for name in names:
        model = build_gpt_model(config, dtype=BF16, device="cuda", seed=1)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        losses = []
        for step in range(50):
            generator = torch.Generator().manual_seed(step % 4)
            ids = torch.randint(0, 128, (2, 384), generator=generator).cuda()
            positions = torch.arange(384).expand(2, -1).cuda()
            params = LayoutParams.from_labels(labels(384, 2, step % 4), backend=name)
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
