"""The kernels of a decode step in Triton's CPU interpreter, beside their references; see interpreted.py."""

from __future__ import annotations

import itertools
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[3]))
os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

from megatron_multiverse.kernels.decode_step import begin_step_reference, end_step_reference
from megatron_multiverse.kernels.decode_step.triton_step import begin_step_triton, end_step_triton
from megatron_multiverse.kernels.fused_linear import (
    dequantize_rows,
    linear_add_reference,
    quantize_rows,
    rms_norm,
    split_rows,
)
from megatron_multiverse.kernels.fused_linear.triton_rows import (
    add_norm_rows,
    norm_rows,
    split_rows_triton,
    swiglu_rows,
)
from megatron_multiverse.kernels.fused_linear.triton_skinny import skinny_linear, skinny_parts
from megatron_multiverse.kernels.kv_write import write_kv_reference
from megatron_multiverse.kernels.kv_write.triton_product import linear_write_kv_triton
from megatron_multiverse.kernels.kv_write.triton_write import write_kv_triton
from megatron_multiverse.kernels.rope import inverse_frequencies, rope_table
from megatron_multiverse.kernels.sampling import Filters, draw_reference, greedy_reference
from megatron_multiverse.kernels.sampling.triton_draw import draw_triton
from megatron_multiverse.kernels.sampling.triton_greedy import greedy_triton
from megatron_multiverse.kernels.sum_norm import sum_norm_reference
from megatron_multiverse.kernels.sum_norm.triton_push import Exchange, sum_norm_push
from megatron_multiverse.kernels.tree_decode import SuccessiveWork, divide_work, tiles, tree_decode_reference
from megatron_multiverse.kernels.tree_decode import work as dividing
from megatron_multiverse.kernels.tree_decode.shares import list_shares
from megatron_multiverse.kernels.tree_decode.triton_decode import tree_decode_triton
from megatron_multiverse.kernels.tree_decode.triton_shares import attend_shares_triton
from tests.unit.kernels.moving import random_moving
from tests.unit.kernels.quick_interpreter import quicken

quicken()
torch.set_num_threads(1)
convert = interpreter._convert_float


def convert_float(values: np.ndarray, source: tl.dtype, target: tl.dtype, rounding: object) -> np.ndarray:
    """The interpreter's, but for FP8, where that loses the carry: it makes 16 of 31.2, as a GPU makes 32."""
    if target != tl.float8e4nv:
        return convert(values, source, target, rounding)
    return torch.from_numpy(values).to(torch.float8_e4m3fn).view(torch.uint8).numpy()


interpreter._convert_float = convert_float
BLOCKS = {"BLOCK_OUT": 16, "BLOCK_K": 32, "num_warps": 4, "num_stages": 1, "PREFETCH": 0}


def check_skinny() -> None:
    """All that can stand beside a product, at sizes that fill no tile, and sums cut among programs."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    for rows, depth, width, splits in ((1, 40, 33, 1), (5, 64, 16, 2), (16, 100, 50, 3), (19, 96, 40, 5)):
        x, weight, up = random(rows, depth), random(width, depth), random(width, depth)
        bias, residual = random(2 * width), random(rows, width)
        options = {"pdl": False, "blocks": BLOCKS | {"SPLITS": splits}}
        got = skinny_linear(x, weight, bias=bias[:width], **options)
        torch.testing.assert_close(got, torch.nn.functional.linear(x, weight, bias[:width]), rtol=1e-5, atol=1e-4)
        for some in (None, bias):
            both = torch.cat((weight, up))
            gate, second = torch.nn.functional.linear(x, both, some).chunk(2, -1)
            got = skinny_linear(x, both, bias=some, swiglu=True, **options)
            torch.testing.assert_close(got, torch.nn.functional.silu(gate) * second, rtol=1e-4, atol=1e-3)
        for some in (None, bias[:width]):
            got = skinny_linear(x, weight, residual=residual.clone(), bias=some, **options)
            want = linear_add_reference(x, weight, residual.clone(), some)
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-4)


def check_skinny_fp8() -> None:
    """Weights in FP8, in what stands beside a product, equal the wider weights that they stand for."""
    generator = torch.Generator().manual_seed(1)
    for rows, depth, width, splits in ((1, 64, 33, 1), (5, 96, 32, 3), (9, 80, 20, 2)):
        x, wide = (torch.randn(*shape, generator=generator) for shape in ((rows, depth), (2 * width, depth)))
        x = x.bfloat16().float()  # what two parts in FP8 can hold
        wide *= torch.logspace(-6, 3, 2 * width)[:, None]
        weight, scale = quantize_rows(wide)
        exact = dequantize_rows(weight, scale, torch.float32)
        assert ((exact - wide).abs() <= wide.abs() / 16 + scale[:, None] * 2**-10).all(), "more than half of a last bit"
        residual = torch.randn(rows, 2 * width, generator=generator)
        options = {"scale": scale, "pdl": False, "blocks": BLOCKS | {"SPLITS": splits}}
        got = skinny_linear(x, weight, bias=residual[0], **options)
        torch.testing.assert_close(got, torch.nn.functional.linear(x, exact, residual[0]), rtol=1e-4, atol=1e-4)
        got = skinny_linear(x, weight, residual=residual.clone(), **options)
        torch.testing.assert_close(got, linear_add_reference(x, exact, residual), rtol=1e-4, atol=1e-4)
        gate, second = torch.nn.functional.linear(x, exact).chunk(2, -1)
        got = skinny_linear(x, weight, swiglu=True, **options)
        torch.testing.assert_close(got, torch.nn.functional.silu(gate) * second, rtol=1e-4, atol=1e-3)


def check_parts() -> None:
    """A product whose parts the norm adds up gives the very bits of the one that adds them up itself."""
    generator = torch.Generator().manual_seed(2)
    for rows, depth, width, splits in ((1, 40, 33, 1), (5, 64, 16, 2), (19, 96, 40, 5)):
        x, wide, stream = (torch.randn(*s, generator=generator) for s in ((rows, depth), (width, depth), (rows, width)))
        bias, norm_weight = torch.randn(2, width, generator=generator)
        options = {"pdl": False, "blocks": BLOCKS | {"SPLITS": splits}}
        for (weight, scale), some in itertools.product(((wide, None), quantize_rows(wide)), (None, bias)):
            want = skinny_linear(x, weight, residual=stream.clone(), bias=some, scale=scale, **options)
            kept, partial = stream.clone(), skinny_parts(x, weight, scale=scale, **options)
            got = add_norm_rows(partial, kept, norm_weight, 1e-5, bias=some, scale=scale, pdl=False)
            assert partial.shape[0] == splits and torch.equal(kept, want)
            assert torch.equal(got, norm_rows(want, norm_weight, 1e-5, pdl=False))


def check_rows() -> None:
    """RMSNorm, SwiGLU and FP8 parts of whole rows, also of rows that are no multiple of anything."""
    generator = torch.Generator().manual_seed(0)
    for rows, width in ((1, 40), (3, 1030)):
        x, weight = torch.randn(rows, width, generator=generator), torch.randn(width, generator=generator)
        x[0] *= 1e-30
        x[-1, ::3] *= torch.logspace(-9, 6, len(x[-1, ::3]))
        for got, want in zip(split_rows_triton(x, pdl=False), split_rows(x), strict=True):
            assert torch.equal(got.float(), want.float())
        x = torch.randn(rows, width, generator=generator)
        got = norm_rows(x, weight, 1e-5, pdl=False)
        torch.testing.assert_close(got, rms_norm(x, weight, 1e-5), rtol=1e-5, atol=1e-5)
        gate, up = x.chunk(2, -1)
        got = swiglu_rows(x, pdl=False)
        torch.testing.assert_close(got, torch.nn.functional.silu(gate) * up, rtol=1e-5, atol=1e-5)


def check_sum_norm() -> None:
    """Ranks one after the other: each finds what the others will have left, and leaves its own with them."""
    generator = torch.Generator().manual_seed(0)
    for ranks, rows, width in ((2, 3, 40), (4, 1, 100), (3, 5, 17)):
        parts = torch.randn(ranks, rows, width, generator=generator)
        residual, weight = torch.randn(rows, width, generator=generator), torch.randn(width, generator=generator)
        places = torch.full((ranks, 2, ranks, 6, width), float("nan"))
        flags = torch.zeros(ranks, 2, ranks, 6, dtype=torch.int32)
        want = sum_norm_reference(list(parts), residual, weight, 1e-5)
        addresses = [torch.tensor([x.data_ptr() for x in memory]) for memory in (places, flags)]
        for turn in (0, 1):
            for rank in range(ranks):
                others = sorted(set(range(ranks)) - {rank})
                flags.zero_()
                for other in others:  # what this rank will wait for
                    places[rank, turn, other, :rows], flags[rank, turn, other, :rows] = parts[other], 1
                exchange = Exchange(
                    rank=rank, places=places[rank], flags=flags[rank], place_addresses=addresses[0],
                    flag_addresses=addresses[1],
                )  # fmt: skip
                got = sum_norm_push(parts[rank], residual, weight, 1e-5, exchange, turn, pdl=False)
                for mine, reference in zip(got, want, strict=True):
                    torch.testing.assert_close(mine, reference, rtol=1e-5, atol=1e-5)
                assert not flags[rank].any(), "flags that were waited for are down again"
                for other in others:
                    assert torch.equal(places[other, turn, rank, :rows], parts[rank])
                    assert flags[other, turn, rank].tolist() == [1] * rows + [0] * (6 - rows)


def check_greedy() -> None:
    """Ties take the first token; rows of -inf but one, and NaN, which shows in the log-probability."""
    generator = torch.Generator().manual_seed(0)
    for rows, vocab in ((1, 7), (3, 5000), (2, 9001)):
        logits = torch.randn(rows, vocab + 3, generator=generator)[:, :vocab]
        logits[0, vocab // 2] = logits[0].max()  # a tie
        logits[-1, 1:] = float("-inf")
        tokens, logprobs = greedy_triton(logits, pdl=False)
        want, want_logprobs = greedy_reference(logits)
        assert torch.equal(tokens, want)
        torch.testing.assert_close(logprobs, want_logprobs, rtol=1e-5, atol=1e-5)
    logits[0, 4500] = float("nan")
    tokens, logprobs = greedy_triton(logits, pdl=False)
    assert logprobs.isfinite().tolist() == [False, True] and 0 <= tokens[0] < vocab


def check_draw() -> None:
    """Rows with and without each filter and all of them, greedy rows between them, ties, -inf, and NaN, which shows."""
    generator = torch.Generator().manual_seed(1)
    for rows, vocab, dtype in ((24, 300, torch.float32), (24, 300, torch.bfloat16), (8, 9001, torch.float32)):
        logits = (3 * torch.randn(rows, vocab + 3, generator=generator)).to(dtype)[:, :vocab]
        logits[1, ::3] = logits[1, 0]  # many ties
        logits[2, 1:-5] = float("-inf")
        keys = torch.randint(-(2**63), 2**63 - 1, (rows,), generator=generator)
        indices = torch.arange(rows)
        temperature = torch.tensor([0.6, 1.0, 1.5, 0.0]).double().repeat(rows // 4)
        top_k = torch.tensor([0, 5, 0, 0, 50, 5, 0, 400])[indices % 8]
        top_p = torch.tensor([1.0, 1.0, 0.3, 1.0, 0.8, 0.5, 0.9, 0.95]).double()[indices % 8]
        min_p = torch.tensor([0.0, 0.0, 0.0, 0.2, 0.0, 0.05, 0.1, 0.0]).double()[indices % 8]
        off = Filters(torch.zeros_like(top_k), torch.ones_like(top_p), torch.zeros_like(min_p))
        for filters in (None, off, Filters(top_k, top_p, min_p)):
            tokens, logprobs = draw_triton(logits, keys, indices, temperature, filters, pdl=False)
            want, want_logprobs = draw_reference(logits, keys, indices, temperature, filters)
            assert torch.equal(tokens, want)
            torch.testing.assert_close(logprobs, want_logprobs, rtol=1e-5, atol=1e-5)
    logits[0, 4500] = float("nan")
    for filters in (None, Filters(top_k, top_p, min_p)):
        tokens, logprobs = draw_triton(logits, keys, indices, temperature, filters, pdl=False)
        assert logprobs.isfinite().tolist() == [False] + [True] * 7 and 0 <= tokens[0] < vocab


def check_begin() -> None:
    """Tokens that are known and that are not, far positions, an embedding wider than a program holds at once."""
    generator = torch.Generator().manual_seed(0)
    for n, dim, width in ((1, 8, 40), (5, 12, 5000), (3, 64, None)):
        ids, last = torch.randint(0, 50, (n,), generator=generator), torch.randint(0, 50, (9,), generator=generator)
        sources = torch.randint(-1, 9, (n,), generator=generator)
        positions = torch.randint(0, 100_000, (n,), generator=generator)
        frequencies = inverse_frequencies(dim, 1e6, "cpu", torch.float32)
        embedding = None if width is None else torch.randn(50, width, generator=generator).bfloat16()
        for tokens in ((sources, last), (None, None)):
            got = begin_step_triton(ids, *tokens, positions, frequencies, embedding, pdl=False)
            want = begin_step_reference(ids, *tokens, positions, frequencies, embedding)
            assert torch.equal(got[0], want[0]) and (width is None) == (got[2] is None)
            torch.testing.assert_close(got[1], want[1], rtol=0, atol=1e-5)
            assert got[2] is None or torch.equal(got[2], want[2])


def check_end() -> None:
    """With and without what was drawn, and what moves; more of it than one program has."""
    generator = torch.Generator().manual_seed(0)
    for n, items, sharers, page_size in ((1, 3, 1, 16), (7, 200, 4, 4), (300, 40, 16, 1), (4, 9, 2, 16)):
        drawn = torch.randint(0, 99, (n,), generator=generator), torch.randn(n, generator=generator)
        moving = random_moving(generator, n, items, sharers, page_size)
        for some, moves in ((drawn, moving), (None, moving), (drawn, None)):
            got, want = ([torch.full((500,), -7), moves and type(moves)(*(x.clone() for x in moves))] for _ in range(2))
            packed = end_step_triton(some, *got, page_size, pdl=False)
            expected = end_step_reference(some, *want, page_size)
            assert torch.equal(got[0], want[0]) and (packed is None) == (expected is None)
            assert packed is None or torch.equal(packed, expected)
            assert moves is None or all(torch.equal(x, y) for x, y in zip(got[1], want[1], strict=True))


def check_write() -> None:
    """Queries, keys and values; a token written twice, a slot of -1 that writes nothing, with and without norms."""
    generator = torch.Generator().manual_seed(0)
    for n, groups, per_group, dim in ((3, 2, 3, 8), (1, 1, 7, 12), (4, 4, 1, 16)):
        mixed = torch.randn(n, groups, (per_group + 2) * dim, generator=generator)
        positions = torch.randint(0, 9999, (1, n), generator=generator)
        table = rope_table(positions, inverse_frequencies(dim, 1e6, "cpu", torch.float32))
        slots = torch.randperm(20, generator=generator)[: n + 2]
        tokens = torch.cat((torch.arange(n), torch.tensor([n - 1, 0])))
        query_norm, key_norm = torch.randn(2, dim, generator=generator)
        for norms in ({}, {"query_norm": query_norm, "key_norm": key_norm, "eps": 1e-5}):
            cache = [torch.zeros(20, groups, dim) for _ in range(4)]
            want = write_kv_reference(mixed, table, *cache[:2], slots[:-1], tokens[:-1], **norms)
            slots[-1] = -1
            got = write_kv_triton(mixed, table, *cache[2:], slots, tokens, **norms, pdl=False)
            for x, y in ((got, want), (cache[2], cache[0]), (cache[3], cache[1])):
                torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)


def check_write_product() -> None:
    """The same as a product and a write: halves of heads in one tile and in several, sums cut among programs."""
    generator = torch.Generator().manual_seed(0)
    for n, groups, per_group, dim, depth, splits in ((3, 2, 3, 16, 40, 1), (1, 1, 7, 64, 96, 2), (19, 4, 1, 32, 64, 3)):
        heads = groups * (per_group + 2)
        x, weight = (torch.randn(*shape, generator=generator) for shape in ((n, depth), (heads * dim, depth)))
        bias = torch.randn(heads * dim, generator=generator)
        positions = torch.randint(0, 9999, (1, n), generator=generator)
        table = rope_table(positions, inverse_frequencies(dim, 1e6, "cpu", torch.float32))
        slots = torch.randperm(40, generator=generator)[: n + 2]
        tokens = torch.cat((torch.randperm(n, generator=generator), torch.tensor([n - 1, 0])))
        for some in (None, bias):
            cache = [torch.zeros(40, groups, dim) for _ in range(4)]
            mixed = torch.nn.functional.linear(x, weight, some).view(n, groups, -1)
            want = write_kv_reference(mixed, table, *cache[:2], slots[:-1], tokens[:-1])
            there = torch.cat((slots[:-1], torch.tensor([-1])))
            got = linear_write_kv_triton(
                x, weight, table, *cache[2:], there, tokens, bias=some, pdl=False,
                blocks=BLOCKS | {"SPLITS": splits},
            )  # fmt: skip
            for x_, y_ in ((got, want), (cache[2], cache[0]), (cache[3], cache[1])):
                torch.testing.assert_close(x_, y_, rtol=1e-4, atol=1e-3)


def check_decode() -> None:
    """Random trees of rows that share pages at several levels; what no row sees holds NaN."""
    rng, generator = np.random.default_rng(2), torch.Generator().manual_seed(0)
    # (rows, most tokens of each): more than the other cases have, with and without shared pages.
    large, together = {1: (6, 1), 2: (6, 10), 3: (4, 1), 9: (26, 1)}, set()
    for case in range(10):
        page_size, groups = int(rng.choice([4, 16, 64])), 4 if case == 9 else int(rng.choice([1, 2]))
        heads, dim = groups * int(rng.choice([1, 3, 7])), int(rng.choice([8, 16, 24]))
        rows, most = large.get(case) or (int(rng.integers(2, 5)), int(rng.choice([1, 10])))
        pages, lengths, counts = random_rows(rng, page_size, rows=rows, most=most, shared=case % 3 > 0)
        assert (pages[1:, 0] == pages[:-1, 0]).any() == (case % 3 > 0), "neighbours share pages"
        borders = np.concatenate(([0], np.cumsum(counts))).astype(np.int64)
        keys, values = torch.full((2, pages.max() + 1, page_size, groups, dim), float("nan"))
        for row, length in zip(pages, lengths, strict=True):
            place = row[np.arange(length) // page_size], np.arange(length) % page_size
            keys[place], values[place] = torch.randn(2, length, groups, dim, generator=generator)
        query = torch.randn(int(borders[-1]), heads, dim, generator=generator)
        arrays = (torch.from_numpy(x) for x in (pages, lengths, borders))
        want = tree_decode_reference(query, keys, values, *arrays, 0.3)
        settings = (1, 64, 8, 256), (64, 16, 9, 16), (64, 16, 4, 4), (1, 8, 2, 16), (64, 16, 1, 256), (64, 16, 8, None)
        # The last case is for the tiles of rows that are not cut, of which there is one for most multiprocessors.
        for processors, slots, sharers, least in settings[-1:] if case == 9 else settings:
            work = divide_work(
                pages, lengths, borders, page_size=page_size, kv_heads=groups, processors=processors, slots=slots,
                sharers=sharers, least_shared=least,
            )  # fmt: skip
            together.add(int((work.tokens >= 0).sum(1).max()))
            tensors = (torch.from_numpy(x) for x in (work.pages, *work[:5]))
            got = tree_decode_triton(query, keys, values, *tensors, 0.3, slots=work.slots, pdl=False)
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert together >= {1, 2, 4, 8, 9}, f"no item is for as many queries as may share one, but for {sorted(together)}"


def check_decode_moved() -> None:
    """Lists that are moved on while rows go on into further pages, of tiles and of items of several rows; what no row
    sees holds NaN until its key is written: the pages that rows will be given, and page 0, which nobody has."""
    rng = np.random.default_rng(1)
    dividing.AT_ONCE = 0  # rows with so few keys would be read one by one
    for rows, huge, page_size in ((8, 8192, 16), (8, 64, 16), (3, 8192, 16), (8, 8192, 1), (8, 64, 1)):
        tiles.HUGE = huge
        table = np.tile(np.arange(1, 1 + 384 // page_size, dtype=np.int32), (rows, 1))
        shared, own = 320 // page_size, 64 // page_size
        table[:, shared:] = 1 + shared + rng.permutation(own * rows).reshape(rows, own)
        lengths = (320 + rng.integers(1, 17, rows)).astype(np.int32)
        lengths[:2] = 336, 335  # the first steps take these into further pages of 16
        cache = torch.full((2, table.max() + 2, page_size, 1, 8), float("nan"))[:, 1:]  # before page 0 is NaN, too
        for row, length in enumerate(lengths.tolist()):
            for key in range(0 if row == 0 else 320, length):
                write_key(rng, cache, table[row], key)
        divider = SuccessiveWork(page_size=page_size, kv_heads=1, processors=4, sharers=9)
        lists = []
        for _ in range(7):
            pages = table[:, : -(-int(lengths.max()) // page_size)].copy()
            work = divider.divide(pages, lengths, np.arange(rows + 1), 16)
            assert work.tokens.shape[1] > 1 and (work.ends is None) == (huge == 64)
            lists.append(work.tokens)
            query = torch.from_numpy(rng.standard_normal((rows, 2, 8))).float()
            arrays = (torch.from_numpy(x) for x in (pages, lengths, np.arange(rows + 1)))
            want = tree_decode_reference(query, *cache, *arrays, 0.3)
            tensors = (torch.from_numpy(x) for x in (work.pages, *work[:5]))
            got = tree_decode_triton(query, *cache, *tensors, 0.3, slots=work.slots, pdl=False)
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
            for row, length in enumerate(lengths.tolist()):
                write_key(rng, cache, table[row], length)
            lengths = lengths + np.int32(1)
        assert len({id(tokens) for tokens in lists}) <= 2, "made anew where a list can be moved on"


def check_shares() -> None:
    """Programs of several items, of rows of any length, and of one block each; what no row sees holds NaN."""
    rng, generator = np.random.default_rng(3), torch.Generator().manual_seed(0)
    for programs, page_size, per_group, dim in ((1, 16, 7, 8), (3, 4, 1, 24), (5, 64, 3, 16), (40, 128, 2, 8)):
        groups = 2
        # 64 keys are a block; of 20 items a program reads the headers in two turns.
        lengths = np.append(rng.integers(1, 200, 18), (64, 128, 1)).astype(np.int32)
        width = -(-int(lengths.max()) // page_size)
        pages = rng.permutation(len(lengths) * width).reshape(len(lengths), width).astype(np.int32)
        cache = torch.full((2, pages.size, page_size, groups, dim), float("nan"))
        for row, length in zip(pages, lengths, strict=True):
            place = row[np.arange(length) // page_size], np.arange(length) % page_size
            cache[0][place], cache[1][place] = torch.randn(2, length, groups, dim, generator=generator)
        query = torch.randn(len(lengths), groups * per_group, dim, generator=generator)
        arrays = (torch.from_numpy(x) for x in (pages, lengths, np.arange(len(lengths) + 1)))
        want = tree_decode_reference(query, *cache, *arrays, 0.3)
        work = list_shares(pages, lengths, programs=programs, slots=8)
        several = int(np.diff(work.shares).max())
        assert several > 16 if programs == 1 else several > 1 or programs == 40
        given = (torch.from_numpy(x) for x in (work.pages, work.items, work.tokens, work.counts, work.shares))
        got = attend_shares_triton(query, *cache, *given, 0.3, slots=work.slots, pdl=False)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def write_key(rng: np.random.Generator, cache: torch.Tensor, pages: np.ndarray, key: int) -> None:
    """Put a random key and value of a row where its pages have it; `cache` is [2, pages, page size, kv heads, dim]."""
    page_size = cache.shape[2]
    cache[:, pages[key // page_size], key % page_size] = torch.from_numpy(
        rng.standard_normal((2, *cache.shape[3:]))
    ).float()


def random_rows(
    rng: np.random.Generator, page_size: int, *, rows: int, most: int, shared: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(pages, lengths, new tokens: at most `most`) of rows; if `shared`, neighbours have their first pages in common:
    the first two one at least."""
    lists: list[list[int]] = []
    fresh = iter(range(10_000))
    for row in range(rows):
        own = int(rng.integers(1, 130))
        kept = lists[-1][: int(rng.integers(int(row == 1), len(lists[-1]) + 1))] if shared and lists else []
        lists.append(kept + [next(fresh) for _ in range(-(-own // page_size))])
    lengths = np.array([len(x) * page_size - rng.integers(0, page_size) for x in lists], dtype=np.int32)
    pages = np.full((len(lists), max(map(len, lists))), 0, dtype=np.int32)
    for row, numbers in enumerate(lists):
        pages[row, : len(numbers)] = numbers
    return pages, lengths, rng.integers(1, 1 + np.minimum(lengths, most))


if __name__ == "__main__":
    choices = check_greedy, check_draw, check_begin, check_end
    decodes = check_decode, check_decode_moved, check_shares
    writes = check_write, check_write_product
    for check in (check_skinny, check_skinny_fp8, check_parts, check_rows, *writes, *choices, *decodes, check_sum_norm):
        check()
        print(check.__name__)
