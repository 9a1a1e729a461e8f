"""Greedy choice and log-probability in two launches: pieces of the vocabulary, then their merge."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

PIECE = 4096


@triton.jit
def _piece_kernel(logits, tops, sums, tokens, vocab, row_step, pieces, PIECE: tl.constexpr, PDL: tl.constexpr):
    """Program (i, j): largest logit of piece j of row i, where it stands, and the sum of exponentials beside it."""
    row, piece = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    entry = piece * PIECE + tl.arange(0, PIECE)
    value = tl.load(logits + row * row_step + entry, mask=entry < vocab, other=float("-inf")).to(tl.float32)
    top = tl.max(value, 0)
    # A piece of -inf alone has no mass; NaN goes through the sum, which makes the log-probability NaN.
    base = tl.where(top == float("-inf"), 0.0, top)
    at = row * pieces + piece
    tl.store(tops + at, top)
    tl.store(sums + at, tl.sum(tl.exp(value - base), 0))
    tl.store(tokens + at, tl.min(tl.where(value == top, entry, vocab - 1), 0))


@triton.jit
def _merge_kernel(tops, sums, tokens, chosen, logprobs, pieces, LANES: tl.constexpr, PDL: tl.constexpr):
    """One program per row."""
    row, lane = tl.program_id(0).to(tl.int64), tl.arange(0, LANES)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    inside = lane < pieces
    top = tl.load(tops + row * pieces + lane, mask=inside, other=float("-inf"))
    total = tl.load(sums + row * pieces + lane, mask=inside, other=0.0)
    token = tl.load(tokens + row * pieces + lane, mask=inside, other=2147483647)
    best = tl.max(top, 0)
    # Pieces are in order, so the smallest token of those that reach the maximum is the first.
    tl.store(chosen + row, tl.min(tl.where(inside & (top == best), token, 2147483647), 0).to(tl.int64))
    mass = tl.sum(tl.where(inside, total * tl.exp(top - best), 0.0), 0)
    tl.store(logprobs + row, -tl.log(mass))


def greedy_triton(logits: Tensor, *, pdl: bool = True) -> tuple[Tensor, Tensor]:
    """See `greedy_reference`; logits [rows, vocab] with contiguous rows, log-probabilities float32.

    pdl: start while the preceding kernel ends; False where there is no GPU.
    """
    rows, vocab = logits.shape
    pieces = triton.cdiv(vocab, PIECE)
    tops, sums = logits.new_empty((2, rows, pieces), dtype=torch.float32)
    tokens = logits.new_empty((rows, pieces), dtype=torch.int32)
    chosen, logprobs = logits.new_empty(rows, dtype=torch.int64), logits.new_empty(rows, dtype=torch.float32)
    options = {"launch_pdl": True} if pdl else {}
    if rows:
        _piece_kernel[(rows, pieces)](
            logits, tops, sums, tokens, vocab, logits.stride(0), pieces, PIECE=PIECE, PDL=pdl, num_warps=8, **options
        )
        _merge_kernel[(rows,)](
            tops, sums, tokens, chosen, logprobs, pieces, LANES=triton.next_power_of_2(pieces), PDL=pdl, num_warps=1,
            **options,
        )  # fmt: skip
    # Where logits are broken no piece may reach the maximum; any token will do, its log-probability is not a number.
    return chosen.clamp_(max=vocab - 1), logprobs
