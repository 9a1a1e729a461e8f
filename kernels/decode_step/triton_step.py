"""What stands before the layers of a decode step, and behind its draw, in a launch each.

In torch's operations these are some fifteen launches of a microsecond or two each, one after the other.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .reference import Moving

LANES = 4096
"""Numbers of an embedding's row that a program holds at a time."""
BLOCK = 512
"""Entries of every array that a program moves on."""


@triton.jit
def _begin_kernel(ids, sources, last_tokens, positions, inv_freq, embedding, known, table, hidden, width, row_step,
                  HALF: tl.constexpr, HALF_LANES: tl.constexpr, LANES: tl.constexpr, SOURCES: tl.constexpr,
                  EMBED: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """One program per token."""
    token = tl.program_id(0).to(tl.int64)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    number = tl.load(ids + token)
    if SOURCES:
        source = tl.load(sources + token)
        number = tl.where(source < 0, number, tl.load(last_tokens + tl.maximum(source, 0)))
    tl.store(known + token, number)
    pair = tl.arange(0, HALF_LANES)
    inside = pair < HALF
    angle = tl.load(positions + token).to(tl.float32) * tl.load(inv_freq + pair, mask=inside, other=0.0)
    tl.store(table + token * 2 * HALF + pair, tl.cos(angle), mask=inside)
    tl.store(table + token * 2 * HALF + HALF + pair, tl.sin(angle), mask=inside)
    if EMBED:
        for start in range(0, width, LANES):
            lane = start + tl.arange(0, LANES)
            row = tl.load(embedding + number * row_step + lane, mask=lane < width)
            tl.store(hidden + token * width + lane, row, mask=lane < width)


def begin_step_triton(
    ids: Tensor,
    sources: Tensor | None,
    last_tokens: Tensor | None,
    positions: Tensor,
    inv_freq: Tensor,
    embedding: Tensor | None,
    *,
    pdl: bool = True,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """See `begin_step_reference`; inv_freq float32.

    pdl: start while the preceding kernel ends; False where there is no GPU.
    """
    half, width = len(inv_freq), 0 if embedding is None else embedding.shape[1]
    known, table = torch.empty_like(ids), inv_freq.new_empty(len(ids), 2 * half)
    hidden = None if embedding is None else embedding.new_empty(len(ids), width)
    if len(ids):
        _begin_kernel[(len(ids),)](
            ids, ids if sources is None else sources, ids if last_tokens is None else last_tokens, positions, inv_freq,
            table if embedding is None else embedding, known, table, table if hidden is None else hidden, width,
            0 if embedding is None else embedding.stride(0), HALF=half, HALF_LANES=triton.next_power_of_2(half),
            LANES=min(LANES, triton.next_power_of_2(max(width, 1))), SOURCES=sources is not None,
            EMBED=embedding is not None, PDL=pdl, num_warps=4, **({"launch_pdl": True} if pdl else {}),
        )  # fmt: skip
    return known, table[None], hidden


@triton.jit
def _end_kernel(drawn, logprobs, packed, last_tokens, rows, sources, positions, size, indices, write_slots, writes,
                items, at_end, num_items, tokens, limits, seats, pages, ends, page_size,
                DRAWN: tl.constexpr, MOVING: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """Program i has entries [i * BLOCK, (i + 1) * BLOCK) of every array."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    if DRAWN:
        token = tl.load(drawn + at, mask=at < rows)
        tl.store(last_tokens + at, token, mask=at < rows)
        tl.store(packed + at, token, mask=at < rows)
        logprob = tl.load(logprobs + at, mask=at < rows).to(tl.float64).to(tl.int64, bitcast=True)
        tl.store(packed + rows + at, logprob, mask=at < rows)
    if MOVING:
        tl.store(sources + at, at.to(tl.int64), mask=at < size)
        tl.store(positions + at, tl.load(positions + at, mask=at < size) + 1, mask=at < size)
        tl.store(indices + at, tl.load(indices + at, mask=at < rows) + 1, mask=at < rows)
        slot = tl.load(write_slots + at, mask=at < writes, other=-1)
        tl.store(write_slots + at, slot + 1, mask=slot >= 0)
        last = tl.load(items + 4 * at + 2, mask=at < num_items)
        tl.store(items + 4 * at + 2, last + tl.load(at_end + at, mask=at < num_items), mask=at < num_items)
        there = tl.load(tokens + at, mask=at < seats, other=-1) >= 0
        tl.store(limits + at, tl.load(limits + at, mask=there) + 1, mask=there)
        end = tl.load(ends + at, mask=at < rows, other=-1)
        slot = tl.load(pages + end, mask=end >= 0, other=-1)
        # Where all of a page may be read already, items end with their rows.
        tl.store(pages + end, slot + 1, mask=(end >= 0) & ((slot + 1) % page_size != 0))


def end_step_triton(
    drawn: tuple[Tensor, Tensor] | None, last_tokens: Tensor, moving: Moving | None, page_size: int, *, pdl: bool = True
) -> Tensor | None:
    """See `end_step_reference`; log-probabilities float32.

    pdl: start while the preceding kernel ends; False where there is no GPU.
    """
    # Where there is nothing, something stands whose address is not used.
    tokens, logprobs = drawn or (last_tokens[:0], last_tokens)
    step = moving or Moving(*[last_tokens[:0]] * len(Moving._fields))
    rows = len(tokens) if moving is None else len(step.indices)
    packed = last_tokens.new_empty(2, len(tokens))
    most = max(rows, len(step.sources), len(step.write_slots), step.tokens.numel())
    if most:
        _end_kernel[(triton.cdiv(most, BLOCK),)](
            tokens, logprobs, packed, last_tokens, rows, step.sources, step.positions, len(step.sources), step.indices,
            step.write_slots, len(step.write_slots), step.items, step.at_end, len(step.items), step.tokens,
            step.limits, step.tokens.numel(), step.pages, step.ends, page_size, DRAWN=drawn is not None,
            MOVING=moving is not None, BLOCK=BLOCK, PDL=pdl, num_warps=4, **({"launch_pdl": True} if pdl else {}),
        )  # fmt: skip
    return None if drawn is None else packed
