"""The sampler draws from the right distribution and is a function of its keys."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from megatron_multiverse.inference import CounterSampler, IncrementalDetokenizer
from megatron_multiverse.inference.sampler import branch_key, filter_logits, gumbel_noise


def row(index=0, key=1, temperature=1.0, top_k=0, top_p=1.0):
    params = SimpleNamespace(temperature=temperature, top_k=top_k, top_p=top_p)
    return SimpleNamespace(request=SimpleNamespace(params=params), key=key, num_sampled=index)


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
    drawn = CounterSampler()(logits, [row(k, temperature=0.7) for k in range(20_000)])
    share = torch.bincount(drawn, minlength=4) / 20_000
    torch.testing.assert_close(share, (logits[0] / 0.7).softmax(-1), atol=0.015, rtol=0)


def test_greedy_rows_beside_drawn_ones():
    logits = torch.randn(64, 50, generator=torch.Generator().manual_seed(0))
    branches = [row(k, temperature=float(k % 2)) for k in range(64)]
    drawn = CounterSampler()(logits, branches)
    assert torch.equal(drawn[::2], logits.argmax(-1)[::2])
    assert not torch.equal(drawn[1::2], logits.argmax(-1)[1::2])


def test_top_k_and_top_p_keep_what_they_should():
    logits = torch.log(torch.tensor([[0.1, 0.4, 0.2, 0.3]])).double().expand(5, 4)
    kept = filter_logits(
        logits, torch.tensor([2, 0, 0, 0, 3]), torch.tensor([1.0, 0.65, 0.01, 1.0, 0.7], dtype=torch.float64)
    ).isfinite()
    assert kept.tolist() == [
        [False, True, False, True],
        [False, True, False, True],
        [False, True, False, False],
        [True, True, True, True],
        [False, True, False, True],
    ]
    only = CounterSampler()(logits.float(), [row(k, top_k=1) for k in range(5)])
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
