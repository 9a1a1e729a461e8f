"""The sampler draws from the right distribution and is a function of its keys."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import pytest
import torch

from megatron_multiverse.inference import CounterSampler, IncrementalDetokenizer, SamplingArrays, Shaping
from megatron_multiverse.inference.text.branch import branch_key
from megatron_multiverse.kernels.sampling import Filters, filter_logits, gumbel_noise, token_logprobs

FIELDS = fields(Shaping)


def rows(count, *, temperature=1.0, top_k=0, top_p=1.0):
    """`count` rows of one branch, that draw its tokens 0, 1, ..."""

    def column(value, dtype):
        return np.broadcast_to(np.asarray(value, dtype=dtype), count).copy()

    return SamplingArrays(
        keys=column(1, np.int64),
        indices=np.arange(count),
        temperature=column(temperature, np.float64),
        shaping=make_shaping(column(0, np.int64), top_k=column(top_k, np.int64), top_p=column(top_p, np.float64)),
    )


def make_shaping(zeros, **arrays):
    """What `zeros` rows ask, which is nothing but `arrays`."""
    empty = {field.name: np.zeros(0, dtype=np.float64 if field.type == "Floats" else np.int64) for field in FIELDS}
    rows = {"top_k": zeros, "top_p": zeros + 1.0, "min_p": zeros * 0.0, "num_logprobs": zeros}
    return Shaping(**empty | rows | arrays)


def test_noise_is_standard_gumbel_and_depends_on_every_argument():
    keys, indices = torch.arange(40), torch.arange(40) * 3
    noise = gumbel_noise(keys, indices, 5000)
    assert torch.equal(noise, gumbel_noise(keys, indices, 5000))
    assert torch.equal(noise[7:9], gumbel_noise(keys[7:9], indices[7:9], 5000))
    assert torch.isfinite(noise).all()
    assert noise.mean().item() == pytest.approx(0.5772, abs=0.02)
    assert noise.var().item() == pytest.approx(torch.pi**2 / 6, abs=0.05)
    assert not torch.equal(noise, gumbel_noise(keys + 1, indices, 5000))
    assert not torch.equal(noise, gumbel_noise(keys, indices + 1, 5000))
    assert torch.corrcoef(noise).fill_diagonal_(0).abs().max() < 0.1


def test_branch_keys_differ_by_seed_sample_and_path():
    arguments = [(0, 0, ()), (1, 0, ()), (0, 1, ()), (0, 0, ((0, 0),)), (0, 0, ((0, 1),)), (0, 0, ((1, 0),))]
    keys = [branch_key(*a) for a in arguments]
    assert len(set(keys)) == len(keys)
    assert all(-(2**63) <= key < 2**63 for key in keys)
    assert branch_key(0, 0, ((0, 1),)) == branch_key(0, 0, [(0, 1)])


def test_draws_follow_the_softmax():
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0]).expand(20_000, 4)
    drawn = CounterSampler()(logits, rows(20_000, temperature=0.7))[0]
    share = torch.bincount(drawn, minlength=4) / 20_000
    torch.testing.assert_close(share, (logits[0] / 0.7).softmax(-1), atol=0.015, rtol=0)


def test_greedy_rows_beside_drawn_ones():
    logits = torch.randn(64, 50, generator=torch.Generator().manual_seed(0))
    drawn, logprobs = CounterSampler()(logits, rows(64, temperature=np.arange(64) % 2))
    assert torch.equal(drawn[::2], logits.argmax(-1)[::2])
    assert not torch.equal(drawn[1::2], logits.argmax(-1)[1::2])
    torch.testing.assert_close(logprobs, logits.log_softmax(-1).gather(1, drawn[:, None])[:, 0])


def test_log_probabilities_are_the_models_own_and_show_broken_logits():
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(1)).bfloat16()
    _, logprobs = CounterSampler()(logits, rows(3, temperature=3.0, top_k=2, top_p=0.5))
    tokens, _ = CounterSampler()(logits, rows(3, temperature=3.0, top_k=2, top_p=0.5))
    assert logprobs.dtype == torch.float32
    torch.testing.assert_close(logprobs, logits.float().log_softmax(-1).gather(1, tokens[:, None])[:, 0])
    logits[1, 7] = float("nan")
    assert token_logprobs(logits, tokens).isfinite().tolist() == [True, False, True]


def test_top_k_and_top_p_keep_what_they_should():
    logits = torch.log(torch.tensor([[0.1, 0.4, 0.2, 0.3]])).double().expand(5, 4)
    kept = filter_logits(
        logits,
        Filters(
            torch.tensor([2, 0, 0, 0, 3]),
            torch.tensor([1.0, 0.65, 0.01, 1.0, 0.7], dtype=torch.float64),
            torch.zeros(5, dtype=torch.float64),
        ),
    ).isfinite()
    assert kept.tolist() == [
        [False, True, False, True],
        [False, True, False, True],
        [False, True, False, False],
        [True, True, True, True],
        [False, True, False, True],
    ]
    only, _ = CounterSampler()(logits.float(), rows(5, top_k=1))
    assert only.tolist() == [1] * 5


def test_text_of_a_branch_comes_in_pieces_that_add_up():
    text = "aä€😀b"
    data = text.encode()
    detokenizer = IncrementalDetokenizer(lambda ids: bytes(ids).decode(errors="replace"))
    pieces = [detokenizer.push([byte]) for byte in data]
    assert "".join(pieces) == text
    assert "\ufffd" not in "".join(pieces)
    assert pieces[:3] == ["a", "", "ä"]
    assert detokenizer.finish() == ""
    detokenizer.push(data[1:2])
    assert detokenizer.finish() == "\ufffd"


def test_pieces_keep_the_space_a_tokenizer_writes_between_words():
    words = {0: "▁a", 1: "▁b", 2: "c"}

    def sentencepiece_like(ids):
        return "".join(words[i] for i in ids).replace("▁", " ").lstrip(" ")

    detokenizer = IncrementalDetokenizer(sentencepiece_like)
    assert [detokenizer.push([i]) for i in (0, 1, 2, 1)] == ["a", " b", "c", " b"]
