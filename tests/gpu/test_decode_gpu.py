"""Decoding on the GPU: every kernel beside its reference, and the engine with CUDA graphs beside one forward."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("megatron.core")

from megatron_multiverse.config import EngineConfig, ModelConfig, SamplingParams
from megatron_multiverse.inference import Engine, Request, drawn_from
from megatron_multiverse.inference.step import graphs as step_graphs
from megatron_multiverse.kernels.decode_step import (
    Moving,
    begin_step,
    begin_step_reference,
    end_step,
    end_step_reference,
)
from megatron_multiverse.kernels.fused_linear import (
    dequantize_rows,
    linear,
    linear_add,
    linear_add_norm,
    linear_swiglu,
    norm,
    quantize_rows,
    split_rows,
)
from megatron_multiverse.kernels.fused_linear.triton_rows import split_rows_triton
from megatron_multiverse.kernels.kv_write import write_kv, write_kv_reference
from megatron_multiverse.kernels.kv_write.triton_product import linear_write_kv_triton
from megatron_multiverse.kernels.rope import inverse_frequencies, rope_table
from megatron_multiverse.kernels.sampling import (
    Filters,
    draw,
    draw_reference,
    greedy,
    greedy_reference,
    token_logprobs,
)
from megatron_multiverse.kernels.tree_decode import TreeDecode, tree_decode_reference
from megatron_multiverse.model.families import qwen2, qwen3
from megatron_multiverse.model.gpt import build_gpt_model
from tests.unit.inference import toy
from tests.unit.kernels.moving import random_moving

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]
BF16 = torch.bfloat16
DEVICE = "cuda"
SHAPE: dict[str, Any] = {
    "num_layers": 3, "hidden_size": 256, "ffn_hidden_size": 512, "num_attention_heads": 8, "num_query_groups": 2,
    "kv_channels": 64, "max_sequence_length": 4096,
}  # fmt: skip


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


@pytest.mark.parametrize("rows", [1, 3, 16, 17, 32, 64])
@pytest.mark.parametrize(("depth", "width"), [(256, 384), (3584, 3584), (8960, 1536), (1536, 9000)])
def test_products_equal_float64(rows, depth, width):
    generator = torch.Generator("cuda").manual_seed(rows + depth)

    def draw(*shape, scale=1.0):
        return (torch.randn(*shape, device="cuda", generator=generator) * scale).to(BF16)

    x, scale, bias = draw(rows, depth), draw(depth), draw(2 * width)
    weight, residual = draw(2 * width, depth, scale=depth**-0.5), draw(rows, width)
    normed = F.rms_norm(x.double(), (depth,), scale.double(), 1e-6)
    want = F.linear(normed, weight.double(), bias.double())
    got = norm(x, scale, 1e-6)
    assert relative(linear(got, weight, bias), want) < 6e-3
    gate, up = want.chunk(2, -1)
    assert relative(linear_swiglu(got, weight, bias), F.silu(gate) * up) < 9e-3
    want = residual.double() + F.linear(x.double(), weight[:width].double(), bias[:width].double())
    for _ in range(3):  # the counters of the programs that share sums are as they were
        kept = residual.clone()
        got = linear_add(x, weight[:width], kept, bias[:width])
        assert got.data_ptr() == kept.data_ptr() and relative(got, want) < 6e-3


@pytest.mark.parametrize("rows", [1, 8, 17, 32, 40, 513, 2049])
@pytest.mark.parametrize(("depth", "width"), [(256, 384), (3584, 3584), (3584, 18944), (8960, 1536), (1536, 8960)])
def test_products_of_weights_in_fp8_equal_float64(rows, depth, width):
    generator = torch.Generator("cuda").manual_seed(rows + depth)
    x, bias = (
        torch.randn(*shape, device="cuda", generator=generator).to(BF16) for shape in ((rows, depth), (2 * width,))
    )
    wide = torch.randn(2 * width, depth, device="cuda", generator=generator) * depth**-0.5
    weight, scale = quantize_rows(wide)
    exact = dequantize_rows(weight, scale, torch.float64)
    want = F.linear(x.double(), exact, bias.double())
    assert relative(linear(x, weight, bias, scale), want) < 6e-3
    gate, up = want.chunk(2, -1)
    assert relative(linear_swiglu(x, weight, bias, scale), F.silu(gate) * up) < 9e-3
    residual = torch.randn(rows, width, device="cuda", generator=generator).to(BF16)
    want = residual.double() + F.linear(x.double(), exact[:width])
    assert relative(linear_add(x, weight[:width], residual, None, scale[:width]), want) < 6e-3


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("rows", [1, 3, 16, 17, 32, 64])
@pytest.mark.parametrize(("depth", "width"), [(256, 384), (3584, 3584), (18944, 3584), (8960, 1536), (1536, 5120)])
def test_a_norm_adds_up_what_a_product_adds_to_the_residual(rows, depth, width, fp8):
    generator = torch.Generator("cuda").manual_seed(rows + depth)
    x, residual, bias, gain = (
        torch.randn(*shape, device="cuda", generator=generator).to(BF16)
        for shape in ((rows, depth), (rows, width), (width,), (width,))
    )
    wide = torch.randn(width, depth, device="cuda", generator=generator) * depth**-0.5
    weight, scale = quantize_rows(wide) if fp8 else (wide.to(BF16), None)
    exact = dequantize_rows(weight, scale, torch.float64).double()
    for some in (None, bias):
        want = residual.double() + F.linear(x.double(), exact, None if some is None else some.double())
        kept = residual.clone()
        got = linear_add_norm(x, weight, kept, gain, 1e-6, some, scale)
        # The squares are added up in another order than in the norm by itself.
        assert relative(kept, want) < 6e-3 and relative(got, norm(kept, gain, 1e-6).double()) < 6e-3


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize("width", [40, 256, 1536, 3584, 8960, 18944])
def test_two_parts_in_fp8_equal_their_reference_bit_for_bit(width, dtype):
    generator = torch.Generator().manual_seed(width)
    x = torch.randn(9, width, generator=generator)
    x[0] *= 1e-30
    x[-1] *= torch.logspace(-9, 6, width)
    x = x.to(dtype)
    for got, want in zip(split_rows_triton(x.cuda()), split_rows(x), strict=True):
        assert torch.equal(got.float().cpu(), want.float())


@pytest.mark.parametrize("norms", [False, True])
def test_the_write_equals_its_reference(norms):
    generator = torch.Generator("cuda").manual_seed(0)
    mixed = torch.randn(5, 4, 9 * 128, device="cuda", generator=generator).to(BF16)
    table = rope_table(torch.arange(5, device="cuda")[None] * 999, inverse_frequencies(128, 1e6, "cuda", torch.float32))
    slots, tokens = torch.tensor([3, 9, 1, 0, 7, 5], device="cuda"), torch.tensor([0, 1, 2, 3, 4, 2], device="cuda")
    scale = torch.rand(2, 128, device="cuda", generator=generator).to(BF16)
    options = {"query_norm": scale[0], "key_norm": scale[1], "eps": 1e-6} if norms else {}
    caches = torch.zeros(4, 12, 4, 128, device="cuda", dtype=BF16)
    got = write_kv(mixed, table, *caches[:2], slots, tokens, **options)
    want = write_kv_reference(mixed, table, *caches[2:], slots, tokens, **options)
    for x, y in ((got, want), (caches[0], caches[2]), (caches[1], caches[3])):
        torch.testing.assert_close(x, y, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("dtype", [torch.float16, BF16])
@pytest.mark.parametrize("rows", [1, 3, 8])
@pytest.mark.parametrize(
    ("depth", "groups", "per_group", "dim"), [(1536, 2, 6, 128), (3584, 4, 7, 128), (896, 2, 7, 64), (256, 4, 1, 32)]
)
def test_a_product_that_writes_equals_a_product_and_a_write(depth, groups, per_group, dim, rows, dtype):
    generator = torch.Generator("cuda").manual_seed(rows + depth)

    def draw(*shape, scale=1.0):
        return (torch.randn(*shape, device="cuda", generator=generator) * scale).to(dtype)

    width = groups * (per_group + 2) * dim
    x, weight, bias = draw(rows, depth), draw(width, depth, scale=depth**-0.5), draw(width)
    positions = torch.randint(0, 40_000, (1, rows), device="cuda", generator=generator)
    table = rope_table(positions, inverse_frequencies(dim, 1e6, "cuda", torch.float32))
    room = 3 * rows + 16  # of a CUDA graph; what is not written is -1
    slots = torch.full((room,), -1, device="cuda")
    slots[: rows + 2] = torch.randperm(64, device="cuda", generator=generator)[: rows + 2]
    tokens = torch.zeros_like(slots)
    tokens[:rows] = torch.randperm(rows, device="cuda", generator=generator)
    for _ in range(3):  # programs that share a sum come in any order
        caches = torch.zeros(4, 64, groups, dim, device="cuda", dtype=dtype)
        got = linear_write_kv_triton(x, weight, table, *caches[:2], slots, tokens, bias=bias)
        mixed = linear(x, weight, bias).view(rows, groups, -1)
        want = write_kv(mixed, table, *caches[2:], slots, tokens)
        assert caches[1].any() and torch.equal(caches[1], caches[3])
        for y, z in ((got, want), (caches[0], caches[2])):
            torch.testing.assert_close(y, z, rtol=8e-3, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize("seed", range(28))
def test_attention_over_random_trees_equals_its_reference(dtype, seed, monkeypatch):
    """From seed 20 on over many rows alone: so many that they are not cut and have tiles of their own, where lengths do
    not differ much; from 24 on of any length, in equal shares."""
    if seed % 4:  # rows read what they share together, whether that takes less time or not, in tiles of any width
        tiles = "megatron_multiverse.kernels.tree_decode.tiles"
        monkeypatch.setattr(f"{tiles}.PLAIN_TIME", float("inf"))
        monkeypatch.setattr(f"{tiles}.TIMES", ((1, 9, 9), (9, 1, 9), (9, 9, 1))[seed % 3])
    rng = np.random.default_rng(seed)
    alone = seed >= 20
    page, groups = int(rng.choice([1, 16, 64])), 4 if alone else int(rng.choice([1, 4]))
    heads, dim = groups * int(rng.choice([1, 5, 7])), int(rng.choice([64, 128]))
    lists: list[list[int]] = []
    fresh = iter(range(1 << 20))
    number = rng.integers(25, 80) if seed >= 24 else rng.integers(25, 33) if alone else rng.integers(1, 12)
    shortest = 2400 if alone and seed < 24 else 1
    for _ in range(int(number)):
        shares = lists and not alone and rng.random() < 0.8
        kept = lists[-1][: int(rng.integers(0, len(lists[-1]) + 1))] if shares else []
        lists.append([*kept, *(next(fresh) for _ in range(-(-int(rng.integers(shortest, 3000)) // page)))])
    lengths = np.array([len(x) * page - rng.integers(0, page) for x in lists], dtype=np.int32)
    pages = np.zeros((len(lists), max(map(len, lists))), dtype=np.int32)
    for row, numbers in enumerate(lists):
        pages[row, : len(numbers)] = numbers
    borders = np.cumsum(
        [0, *rng.integers(1, 1 + np.minimum(lengths, 1 if alone else rng.choice([1, 20, 300])))]
    ).astype(np.int64)
    generator = torch.Generator("cuda").manual_seed(seed)
    shape = (2, pages.max() + 1, page, groups, dim)
    keys, values = torch.randn(*shape, device="cuda", generator=generator).to(dtype)
    unseen = torch.ones(*shape[1:3], dtype=torch.bool)
    for listed, length in zip(pages, lengths.tolist(), strict=True):
        unseen[listed[np.arange(length) // page], np.arange(length) % page] = False
    keys[unseen.cuda()], values[unseen.cuda()] = float("nan"), float("nan")
    query = torch.randn(int(borders[-1]), heads, dim, device="cuda", generator=generator).to(dtype)
    arrays = [torch.from_numpy(x).cuda() for x in (pages, lengths, borders)]
    want = tree_decode_reference(query.double(), keys.double(), values.double(), *arrays, dim**-0.5)
    attend = TreeDecode(pages, lengths, borders)
    results = [attend(query, keys, values, dim**-0.5) for _ in range(3)]
    assert relative(results[0], want) < (2e-5 if dtype is torch.float32 else 6e-3)
    assert all(torch.equal(result, results[0]) for result in results), "parts are merged in an order that varies"


@pytest.mark.parametrize("width", [1536, 8192, None])
def test_steps_begin_as_the_reference_says(width):
    """Also at positions whose angles are thousands of turns."""
    ids, last = torch.randint(0, 500, (33,), device=DEVICE), torch.randint(0, 500, (70,), device=DEVICE)
    sources, positions = torch.randint(-1, 70, (33,), device=DEVICE), torch.randint(0, 200_000, (33,), device=DEVICE)
    frequencies = inverse_frequencies(128, 1e4, DEVICE, torch.float32)
    embedding = None if width is None else torch.randn(500, width, device=DEVICE).to(BF16)
    got = begin_step(ids, sources, last, positions, frequencies, embedding)
    want = begin_step_reference(ids, sources, last, positions, frequencies, embedding)
    assert torch.equal(got[0], want[0]) and (got[2] is None or torch.equal(got[2], want[2]))
    exact = rope_table(positions[None], frequencies.double())
    torch.testing.assert_close(got[1], want[1], rtol=0, atol=1e-6)
    assert (got[1] - exact).abs().max() < 1.5 * (want[1] - exact).abs().max() + 1e-6


@pytest.mark.parametrize(("n", "items", "sharers", "page_size"), [(1, 33, 1, 16), (96, 700, 9, 16), (512, 900, 16, 1)])
def test_steps_end_as_the_reference_says(n, items, sharers, page_size):
    moving = random_moving(torch.Generator().manual_seed(n), n, items, sharers, page_size)
    drawn = torch.randint(0, 99, (n,), device=DEVICE), torch.randn(n, device=DEVICE)
    for some, moves in ((drawn, moving), (None, moving), (drawn, None)):
        last, other_last = (torch.zeros(600, dtype=torch.int64, device=DEVICE) for _ in range(2))
        here, there = (moves and Moving(*(x.to(DEVICE) for x in moves)) for _ in range(2))
        packed, expected = end_step(some, last, here, page_size), end_step_reference(some, other_last, there, page_size)
        assert torch.equal(last, other_last) and (packed is None) == (expected is None) == (some is None)
        assert packed is None or expected is None or torch.equal(packed, expected)
        assert all(torch.equal(x, y) for x, y in zip(here or (), there or (), strict=True))


def test_greedy_equals_its_reference():
    logits = torch.randn(9, 152064, device="cuda").to(BF16)[:, :151665]
    tokens, logprobs = greedy(logits)
    want, want_logprobs = greedy_reference(logits)
    assert torch.equal(logits.gather(1, tokens[:, None]), logits.gather(1, want[:, None]))
    torch.testing.assert_close(logprobs, want_logprobs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("spread", [0.02, 1.0, 6.0])
def test_drawn_tokens_are_those_of_the_reference(dtype, spread):
    """Flat, usual and peaked logits; where the mass before a token is top-p up to rounding, either side is right."""
    generator = torch.Generator(DEVICE).manual_seed(3)
    logits = (spread * torch.randn(96, 152064, device=DEVICE, generator=generator)).to(dtype)[:, :151665]
    keys = torch.randint(-(2**63), 2**63 - 1, (96,), device=DEVICE, generator=generator)
    indices = torch.arange(96, device=DEVICE)
    temperature = torch.tensor([0.6, 1.0, 1.5, 0.0], device=DEVICE).double().repeat(24)
    top_k = torch.tensor([0, 20, 0, 0, 50, 5, 0, 0], device=DEVICE)[indices % 8]
    top_p = torch.tensor([1.0, 1.0, 0.3, 1.0, 0.8, 0.5, 0.95, 0.95], device=DEVICE).double()[indices % 8]
    min_p = torch.tensor([0.0, 0.0, 0.0, 0.2, 0.0, 0.05, 0.1, 0.0], device=DEVICE).double()[indices % 8]
    for filters in (None, Filters(top_k, top_p, min_p)):
        tokens, logprobs = draw(logits, keys, indices, temperature, filters)
        want, _ = draw_reference(logits, keys, indices, temperature, filters)
        assert (tokens != want).sum() <= 1, f"{int((tokens != want).sum())} rows differ"
        torch.testing.assert_close(logprobs, token_logprobs(logits, tokens), rtol=1e-5, atol=1e-5)
        assert torch.equal(tokens, draw(logits, keys, indices, temperature, filters)[0])


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize("group", range(4))
def test_random_trees_by_graphs_equal_one_forward(overlap, page_size, group, monkeypatch):
    """16 runs of 8 trees: forks, joins, nested blocks; every logit against one forward over the whole answer."""
    monkeypatch.setattr(toy, "OVERLAP", overlap)
    config = ModelConfig(**SHAPE | {"vocab_size": toy.VOCAB_SIZE}, add_qkv_bias=group % 2 == 0)
    model = build_gpt_model(config, dtype=torch.float32, device="cuda", seed=group).eval()
    scripts, requests = [], []
    for k in range(8):
        rng = random.Random(1000 * group + k)
        depth, blocks, most_paths = rng.choice([(1, 2, 5), (1, 1, 9), (2, 1, 3), (2, 2, 2), (3, 1, 2)])
        script = toy.random_script(rng, depth=depth, blocks=blocks, most_paths=most_paths, text=8)
        scripts.append(toy.tags_on_own_lines(script))
        requests.append(toy.ask(toy.random_prompt(rng), max_tokens=3000, sample=k))
    sampler = toy.ScriptedSampler(scripts)
    engine = toy.toy_engine(
        model, page_size=page_size, num_pages=24_000 // page_size, sampler=sampler, max_position=10**9
    )
    results = engine.generate(requests)
    assert engine.runner.graphs is not None and engine.runner.graphs.replays > 100
    assert toy.largest_difference(model, sampler, requests, results, logprob_atol=1e-3) < 1e-3
    toy.assert_drained(engine)
    engine.runner.close()


def answers_of_random_trees(model, count, *, blocks=None, most_paths=5, **settings):
    """(sampler, requests, results) of so many scripted answers, served at once by graphs; `blocks` 0: plain text."""
    scripts, requests = [], []
    for k in range(count):
        rng = random.Random(k)
        depth, each = rng.choice([(1, 2), (1, 1), (2, 1)])
        each = each if blocks is None else blocks
        scripts.append(toy.random_script(rng, depth=depth, blocks=each, most_paths=most_paths, text=8 if each else 60))
        requests.append(toy.ask(toy.random_prompt(rng), max_tokens=3000, sample=k))
    sampler = toy.ScriptedSampler(scripts)
    engine = toy.toy_engine(model, page_size=16, num_pages=8000, sampler=sampler, max_position=10**9, **settings)
    results = engine.generate(requests)
    toy.assert_drained(engine)
    engine.runner.close()
    return sampler, requests, results, engine.runner.graphs


@pytest.mark.parametrize("most_graphs", [256, 2])
def test_large_steps_by_graphs_equal_one_forward(most_graphs, monkeypatch):
    """More rows than 128, as many requests that fork have; also where graphs are dropped and captured again."""
    monkeypatch.setattr(toy, "OVERLAP", True)
    monkeypatch.setattr(step_graphs, "MOST_GRAPHS", most_graphs)
    config = ModelConfig(**SHAPE | {"vocab_size": toy.VOCAB_SIZE})
    model = build_gpt_model(config, dtype=torch.float32, device="cuda", seed=0).eval()
    sampler, requests, results, graphs = answers_of_random_trees(model, 90, max_rows=256)
    assert len(graphs.graphs) <= most_graphs
    assert most_graphs < 256 or {kind.size for kind in graphs.graphs} & {192, 256}
    assert toy.largest_difference(model, sampler, requests, results, logprob_atol=1e-3) < 1e-3


def test_short_prompts_in_float32_by_graphs_equal_one_forward():
    """Each alone, so that it is one step: up to 512 tokens see few keys, those of a longer prompt run call by call."""
    config = ModelConfig(**SHAPE | {"vocab_size": toy.VOCAB_SIZE})
    model = build_gpt_model(config, dtype=torch.float32, device="cuda", seed=0).eval()
    scripts, requests = [], []
    for k, length in enumerate((150, 256, 300, 511, 700)):
        rng = random.Random(k)
        scripts.append(toy.random_script(rng, depth=1, blocks=1, most_paths=3, text=8))
        prompt = [rng.randrange(toy.TEXT, toy.VOCAB_SIZE) for _ in range(length)]
        requests.append(toy.ask(prompt, max_tokens=3000, sample=k))
    sampler = toy.ScriptedSampler(scripts)
    engine = toy.toy_engine(
        model, page_size=16, num_pages=8000, sampler=sampler, max_position=10**9, max_step_tokens=2048
    )
    results = [engine.generate([request])[0] for request in requests]
    graphs = engine.runner.graphs
    assert graphs is not None and {kind.size for kind in graphs.graphs} >= {192, 256, 384, 512}
    assert toy.largest_difference(model, sampler, requests, results, logprob_atol=1e-3) < 1e-3
    engine.runner.close()


def test_prompts_by_graphs_are_as_close_to_one_forward_as_call_by_call():
    """Of all lengths, chunks of those that come one after the other, while others decode."""
    config = ModelConfig(**SHAPE | {"vocab_size": toy.VOCAB_SIZE})
    model = build_gpt_model(config, dtype=BF16, device="cuda", seed=0).eval()
    scripts, requests = [], []
    for k, length in enumerate((150, 20, 700, 64, 129, 1500, 65, 300, 2900, 1, 400, 90)):
        rng = random.Random(k)
        scripts.append(toy.random_script(rng, depth=1, blocks=1, most_paths=3, text=8))
        requests.append(
            toy.ask([rng.randrange(toy.TEXT, toy.VOCAB_SIZE) for _ in range(length)], max_tokens=3000, sample=k)
        )
    differences = {}
    for cuda_graphs in (True, False):
        sampler = toy.ScriptedSampler(scripts)
        engine = toy.toy_engine(
            model, page_size=16, num_pages=8000, sampler=sampler, max_position=10**9, max_step_tokens=700, max_rows=64,
            cuda_graphs=cuda_graphs,
        )  # fmt: skip
        results = engine.generate(requests)
        if (graphs := engine.runner.graphs) is not None:
            assert any(kind.keys for kind in graphs.graphs) and graphs.replays > 0.9 * engine.num_steps
        differences[cuda_graphs] = largest(*logits_in_pairs(model, sampler, requests, results))
        engine.runner.close()
    assert differences[True] < 1.3 * differences[False], differences


def test_random_trees_in_bf16_are_as_close_to_one_forward_as_plain_text_is():
    """Rounding makes any two ways to cut a text into passes differ: tokens one by one, and all at once. 120 trees may
    not differ more than 120 plain texts do, and choose the same tokens wherever nothing is as close as that."""
    config = ModelConfig(**SHAPE | {"vocab_size": toy.VOCAB_SIZE})
    model = build_gpt_model(config, dtype=BF16, device=DEVICE, seed=1).eval()
    pairs = {}
    for blocks in (0, None):
        sampler, requests, results, _ = answers_of_random_trees(model, 120, blocks=blocks)
        pairs[blocks] = logits_in_pairs(model, sampler, requests, results)
    noise = largest(*pairs[0])
    print(f"largest difference of logits: plain text {noise:.4f}, trees {largest(*pairs[None]):.4f}")
    got, want = pairs[None]
    assert len(got) > 2000 and largest(got, want) < 1.5 * noise
    best = want.topk(2).values
    clear = best[:, 0] - best[:, 1] > noise
    assert clear.float().mean() > 0.5 and torch.equal(got.argmax(1)[clear], want.argmax(1)[clear])


def logits_in_pairs(model, sampler, requests, results):
    """(of the engine's steps, of one forward over each answer), [draws, vocab] each."""
    got, want = [], []
    for request, result in zip(requests, results, strict=True):
        reference = toy.forward_logits(model, request.prompt_ids, result)
        for drawn, before in drawn_from(result, sample=request.sample).items():
            if drawn in sampler.logits:
                got.append(sampler.logits[drawn].float())
                want.append(reference[len(request.prompt_ids) + before].float())
    return torch.stack(got), torch.stack(want)


def largest(got, want):
    return float((got - want).abs().max())


@pytest.mark.parametrize("family", [qwen2, qwen3])
@pytest.mark.parametrize(
    "asked",
    [{}, {"temperature": 0.9}, {"temperature": 0.9, "top_k": 40, "top_p": 0.8}, {"temperature": 1.5, "min_p": 0.1}],
)
def test_graphs_draw_what_single_calls_draw(family, asked):
    """Bit for bit, as long as both cut rows into the same items: beyond 159 keys a graph's list has been moved on."""
    model = build_gpt_model(family(**SHAPE, vocab_size=1000), dtype=BF16, device="cuda").eval()
    requests = [
        Request(
            prompt_ids=[100 + (7 * k + i) % 800 for i in range(128)],  # 768 in one step, as many as a graph has
            sampling=SamplingParams(max_tokens=31, ignore_eos=True, seed=k, **asked if k % 3 else {}),
        )
        for k in range(6)
    ]
    answers = []
    for cuda_graphs in (False, True):
        config = EngineConfig(num_pages=400, cuda_graphs=cuda_graphs, overlap=cuda_graphs)
        engine = Engine(model, toy.VOCAB, config, vocab_size=990)
        answers.append([(result.token_ids, result.logprobs) for result in engine.generate(requests)])
        graphs = engine.runner.graphs
        assert (graphs is not None) == cuda_graphs
        if graphs is not None:
            assert all(kind.draw != "logits" for kind in graphs.graphs), "filters act inside of graphs"
            assert {kind.size for kind in graphs.graphs if kind.keys} == {768}
        engine.runner.close()
    assert answers[0] == answers[1]
