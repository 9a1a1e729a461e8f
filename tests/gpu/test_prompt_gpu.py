"""Attention of prompts: FlashAttention 4 and torch's kernels beside the plain version."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megatron_multiverse.kernels.multiverse_attention.flash4 import flash4_problem
from megatron_multiverse.kernels.multiverse_attention.layout import AttentionCase
from megatron_multiverse.kernels.tree_decode import prompt as prompt_module
from megatron_multiverse.kernels.tree_decode import tree_decode
from megatron_multiverse.kernels.tree_decode.prompt import Prompt, attend_prompt

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]
PAGE = 16


@pytest.mark.parametrize("way", ["flash4", "torch"])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(28, 4, 128), (12, 2, 128), (14, 2, 64), (8, 8, 128)])
@pytest.mark.parametrize(("count", "length"), [(65, 65), (2048, 2048), (130, 1000), (777, 5003)])
def test_a_prompt_after_other_tokens_equals_the_formula(way, heads, kv_heads, dim, count, length, monkeypatch):
    monkeypatch.setattr(prompt_module, "MANY_KEYS", 0)
    if way == "torch":
        monkeypatch.setattr(prompt_module, "_has_flash4", lambda *_: False)
    elif problem := flash4_problem(AttentionCase("cuda", torch.bfloat16, dim)):
        pytest.skip(problem)
    torch.manual_seed(length)
    num_pages = -(-length // PAGE)
    pages = np.random.default_rng(length).permutation(num_pages + 3)[:num_pages].astype(np.int32)
    query = torch.randn(count, heads, dim, device="cuda", dtype=torch.bfloat16)
    keys, values = torch.randn(2, num_pages + 3, PAGE, kv_heads, dim, device="cuda", dtype=torch.bfloat16)
    prompt = Prompt.upload(pages, length, 0, count, PAGE, query.device)
    got = attend_prompt(query, keys, values, prompt, dim**-0.5)
    rows = (torch.from_numpy(pages)[None], torch.tensor([length], dtype=torch.int32), torch.tensor([0, count]))
    want = tree_decode(*(x.cpu().double() for x in (query, keys, values)), *rows, dim**-0.5)
    assert (got.cpu().double() - want).norm() / want.norm() < 5e-3
