"""An engine in FP8 is the engine of the model whose weights are rounded so."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("megatron.core")

from megatron_multiverse.config import EngineConfig, ModelConfig, SamplingParams
from megatron_multiverse.errors import ConfigError
from megatron_multiverse.inference import Engine, Request
from megatron_multiverse.kernels.fused_linear import FP8, dequantize_rows, quantize_rows
from megatron_multiverse.model.gpt import build_gpt_model
from megatron_multiverse.model.weights import copy_weights

from . import toy
from .test_engine import goal

PRODUCTS = ("linear_qkv.weight", "linear_proj.weight", "linear_fc1.weight", "linear_fc2.weight")


def model(seed=3):
    config = ModelConfig(
        num_layers=2, hidden_size=32, ffn_hidden_size=64, num_attention_heads=4, num_query_groups=2, kv_channels=8,
        vocab_size=toy.VOCAB_SIZE, max_sequence_length=512, add_qkv_bias=True,
    )  # fmt: skip
    return build_gpt_model(config, dtype=torch.float64, seed=seed).eval()


def request():
    sampling = SamplingParams(max_tokens=120, branch_max_tokens=20, ignore_eos=True, temperature=0.7)
    return Request(prompt_ids=[26, 27, 28], sampling=sampling, answer_start=goal(2))


def answers(built, **config):
    engine = Engine(built, toy.VOCAB, EngineConfig(num_pages=100, **config), detokenize=toy.toy_text)
    results = engine.generate([request()])
    return engine, [(result.token_ids, result.logprobs) for result in results]


def test_it_equals_the_model_with_rounded_weights():
    rounded = model()
    with torch.no_grad():
        for name, weight in rounded.named_parameters():
            if name.endswith(PRODUCTS):
                weight.copy_(dequantize_rows(*quantize_rows(weight), torch.float64))
    want = answers(rounded)[1]
    quantised = model()
    _, got = answers(quantised, quantization="fp8")
    (ids, logprobs), (want_ids, want_logprobs) = *got, *want
    assert ids == want_ids and logprobs == pytest.approx(want_logprobs, abs=1e-9)
    assert logprobs != pytest.approx(answers(model())[1][0][1], abs=1e-4), "rounding changes nothing"
    weights = dict(quantised.named_parameters())
    assert {name for name, weight in weights.items() if weight.dtype == FP8} == {
        name for name in weights if name.endswith(PRODUCTS)
    }
    assert answers(quantised, quantization="fp8")[1] == got, "a second engine takes the weights as they are"


@pytest.mark.parametrize("finer", [torch.float64, torch.bfloat16])
def test_new_weights_are_rounded_as_those_of_a_new_engine_are(finer):
    """Also from weights of another format: they are first rounded to that of the engine's other weights."""
    quantised, other = model(), model(seed=5).to(finer)
    engine, before = answers(quantised, quantization="fp8")
    held = dict(quantised.named_parameters())
    copy_weights(other, quantised)
    engine.use_weights(1)
    results = engine.generate([request()])
    want = answers(model(seed=5).to(finer).double(), quantization="fp8")[1]
    assert [(result.token_ids, result.logprobs) for result in results] == want != before
    assert results[0].weight_versions == [1] * len(results[0].token_ids)
    assert all(weight is held[name] for name, weight in quantised.named_parameters()), "graphs keep their tensors"
    with pytest.raises(ConfigError, match="differ in"):
        copy_weights(quantised, model())


def test_models_that_are_not_run_product_by_product_are_refused():
    with pytest.raises(ConfigError, match="needs a model made by build_gpt_model"):
        toy.toy_engine(quantization="fp8")
