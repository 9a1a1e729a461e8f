"""An engine in FP8 is the engine of the model whose weights are rounded so."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("megatron.core")

from megatron_multiverse.config import EngineConfig, ModelConfig, SamplingParams
from megatron_multiverse.errors import ConfigError, GenerationError
from megatron_multiverse.inference import Engine, Request
from megatron_multiverse.kernels.fused_linear import FP8, dequantize_rows, quantize_rows
from megatron_multiverse.model.gpt import build_gpt_model
from megatron_multiverse.model.weights import copy_weights

from . import toy
from .test_engine import goal

PRODUCTS = ("linear_qkv.weight", "linear_proj.weight", "linear_fc1.weight", "linear_fc2.weight")


def model():
    config = ModelConfig(
        num_layers=2, hidden_size=32, ffn_hidden_size=64, num_attention_heads=4, num_query_groups=2, kv_channels=8,
        vocab_size=toy.VOCAB_SIZE, max_sequence_length=512, add_qkv_bias=True,
    )  # fmt: skip
    return build_gpt_model(config, dtype=torch.float64, seed=3).eval()


def answers(built, **config):
    engine = Engine(built, toy.VOCAB, EngineConfig(num_pages=100, **config), detokenize=toy.toy_text)
    sampling = SamplingParams(max_tokens=120, branch_max_tokens=20, ignore_eos=True, temperature=0.7)
    results = engine.generate([Request(prompt_ids=[26, 27, 28], sampling=sampling, answer_start=goal(2))])
    return engine, [(result.token_ids, result.logprobs) for result in results]


def test_it_equals_the_model_with_rounded_weights():
    rounded = model()
    with torch.no_grad():
        for name, weight in rounded.named_parameters():
            if name.endswith(PRODUCTS):
                weight.copy_(dequantize_rows(*quantize_rows(weight), torch.float64))
    want = answers(rounded)[1]
    quantised = model()
    engine, got = answers(quantised, quantization="fp8")
    (ids, logprobs), (want_ids, want_logprobs) = *got, *want
    assert ids == want_ids and logprobs == pytest.approx(want_logprobs, abs=1e-9)
    assert logprobs != pytest.approx(answers(model())[1][0][1], abs=1e-4), "rounding changes nothing"
    weights = dict(quantised.named_parameters())
    assert {name for name, weight in weights.items() if weight.dtype == FP8} == {
        name for name in weights if name.endswith(PRODUCTS)
    }
    with pytest.raises(GenerationError, match="cannot be exchanged"):
        engine.use_weights(1)
    with pytest.raises(ConfigError, match="differ"):
        copy_weights(model(), quantised)
    assert answers(quantised, quantization="fp8")[1] == got, "a second engine takes the weights as they are"


def test_models_that_are_not_run_product_by_product_are_refused():
    with pytest.raises(ConfigError, match="needs a model made by build_gpt_model"):
        toy.toy_engine(quantization="fp8")
