"""The forward pass of decoding against the model's own call, over the same cache."""

from __future__ import annotations

import pytest
import torch

from megatron_multiverse.config import EngineConfig
from megatron_multiverse.inference import Engine
from megatron_multiverse.inference.step.forward import PagedForward
from megatron_multiverse.model.families import llama3, qwen2, qwen3
from megatron_multiverse.model.gpt import build_gpt_model

from .toy import VOCAB, VOCAB_SIZE, ask

SHAPE = {
    "num_layers": 2, "hidden_size": 48, "ffn_hidden_size": 80, "num_attention_heads": 6, "num_query_groups": 2,
    "kv_channels": 8, "vocab_size": VOCAB_SIZE, "max_sequence_length": 512,
}  # fmt: skip


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", [qwen2, qwen3, llama3])
def test_the_forward_pass_gives_what_the_model_gives(family, tied, monkeypatch):
    model = build_gpt_model(
        family(**SHAPE, share_embeddings_and_output_weights=tied), dtype=torch.float64, seed=3
    ).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # fresh biases are zero and fresh norms one: neither would show a mistake
        for weight in model.parameters():
            weight.add_(torch.randn(weight.shape, generator=generator, dtype=weight.dtype) * 0.1)
    requests = [ask([30 + k, 31, 40 + k], max_tokens=40, ignore_eos=True, sample=k) for k in range(4)]

    def answer() -> tuple[list[list[int]], torch.Tensor]:
        engine = Engine(model, VOCAB, EngineConfig(num_pages=64, debug=True))
        results = engine.generate(requests)
        engine.runner.close()
        return [r.token_ids for r in results], torch.tensor([x for r in results for x in r.logprobs if x is not None])

    assert PagedForward.runs(model)
    tokens, logprobs = answer()
    with monkeypatch.context() as patch:
        patch.setattr(PagedForward, "runs", lambda model: False)
        want_tokens, want_logprobs = answer()
    assert tokens == want_tokens
    torch.testing.assert_close(logprobs, want_logprobs, rtol=0, atol=1e-12)


def test_weights_changed_in_place_are_used():
    model = build_gpt_model(llama3(**SHAPE), dtype=torch.float64).eval()
    forward = PagedForward(model)
    with torch.no_grad():
        model.decoder.layers[1].mlp.linear_fc2.weight.fill_(7.0)
    assert float(forward.layers[1].fc2.weight.min()) == 7.0
