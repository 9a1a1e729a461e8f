"""The choice between the layer specs, and names that do not depend on it. TransformerEngine's own layers need a GPU:
tests/gpu/test_layers_gpu.py."""

from __future__ import annotations

import dataclasses
import importlib.util
import logging
import sys
import types

import pytest
import torch

from megatron_multiverse.config import LayerConfig, ModelConfig
from megatron_multiverse.errors import ConfigError
from megatron_multiverse.model import gpt, layer_specs
from megatron_multiverse.model.families import preset
from megatron_multiverse.model.gpt import build_gpt_model, transformer_config
from megatron_multiverse.model.layer_specs import choose_transformer_impl
from megatron_multiverse.model.weights import weight_state
from megatron_multiverse.weight_names import FUSED_NORMS, fused_name, is_extra_state, plain_name
from tests.copied_weights import copy_weights

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
HALF, FULL = torch.bfloat16, torch.float32


@pytest.fixture
def installed(monkeypatch):
    """As if TransformerEngine were there."""
    monkeypatch.setattr(layer_specs, "transformer_engine_problem", lambda device: None)
    monkeypatch.setattr(layer_specs.importlib.metadata, "version", lambda name: "2.20")


@pytest.fixture
def absent(monkeypatch):
    """As if it were not."""
    find = importlib.util.find_spec
    monkeypatch.setattr(
        layer_specs.importlib.util, "find_spec", lambda name: None if name == "transformer_engine" else find(name)
    )


def test_auto_takes_transformer_engine_where_it_is_fast(installed, caplog) -> None:
    layer_specs._log_once.cache_clear()
    with caplog.at_level(logging.INFO):
        assert choose_transformer_impl(LayerConfig(transformer_impl="local"), torch.device("meta"), HALF) == "local"
        assert choose_transformer_impl(LayerConfig(), CUDA, HALF) == "transformer_engine"
        assert choose_transformer_impl(LayerConfig(), CUDA, HALF) == "transformer_engine"
        assert choose_transformer_impl(LayerConfig(), CUDA, FULL) == "local"
        assert choose_transformer_impl(LayerConfig(), CPU, HALF) == "local"
        assert choose_transformer_impl(LayerConfig(transformer_impl="local"), CUDA, HALF) == "local"
    assert [record.getMessage() for record in caplog.records] == [
        "transformer layers: transformer_engine (TransformerEngine 2.20 is installed)",
        "transformer layers: local (torch.float32 is for exactness, not for speed)",
        "transformer layers: local (on cpu)",
        "transformer layers: local (asked for)",
    ]


def test_what_cannot_run_is_explained(absent) -> None:
    assert choose_transformer_impl(LayerConfig(), CUDA, HALF) == "local"
    asked = LayerConfig(transformer_impl="transformer_engine")
    with pytest.raises(ConfigError, match=r"transformer_impl 'transformer_engine' .*megatron-multiverse\[gpu\]"):
        choose_transformer_impl(asked, CUDA, HALF)
    with pytest.raises(ConfigError, match="needs a CUDA device, got cpu"):
        build_gpt_model(preset("tiny"), layers=asked)
    with pytest.raises(ConfigError, match=r"layers.fp8 'hybrid' cannot run here: .*megatron-multiverse\[gpu\]"):
        choose_transformer_impl(LayerConfig(fp8="hybrid"), CUDA, HALF)
    with pytest.raises(ConfigError, match=r"fp8 'e4m3' cannot .* got cpu\. Mend that, or leave layers.fp8 unset"):
        choose_transformer_impl(LayerConfig(fp8="e4m3"), CPU, HALF)
    both = (
        r"transformer_impl 'transformer_engine' and layers.fp8 'e4m3' .* leave layers.transformer_impl and layers.fp8"
    )
    with pytest.raises(ConfigError, match=both):
        choose_transformer_impl(LayerConfig(fp8="e4m3", transformer_impl="transformer_engine"), CUDA, HALF)
    with pytest.raises(ConfigError, match="recompute_granularity 'full' needs a CUDA device"):
        build_gpt_model(preset("tiny"), layers=LayerConfig(recompute_granularity="full"))


def test_what_transformer_engine_cannot_do_is_refused(installed, monkeypatch) -> None:
    te = LayerConfig(transformer_impl="transformer_engine")
    assert choose_transformer_impl(te, CUDA, FULL) == "transformer_engine"
    with pytest.raises(ConfigError, match="no float64, set dtype to bf16 or float32"):
        choose_transformer_impl(te, CUDA, torch.float64)
    norms = {"recompute_granularity": "selective", "recompute_modules": ("mlp", "layernorm")}
    with pytest.raises(ConfigError, match=r"layernorm has no effect .* set layers.transformer_impl to local"):
        choose_transformer_impl(LayerConfig(**norms), CUDA, HALF)
    assert choose_transformer_impl(LayerConfig(**norms, transformer_impl="local"), CUDA, HALF) == "local"
    assert choose_transformer_impl(LayerConfig(**norms), CUDA, FULL) == "local"
    for name in ("transformer_engine", "transformer_engine.pytorch"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    with pytest.raises(ConfigError, match=r"fp8 'hybrid' cannot run here: TransformerEngine 2.20 is too old"):
        choose_transformer_impl(LayerConfig(fp8="hybrid"), CUDA, HALF)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"transformer_impl": "te"}, "allowed: auto, local, transformer_engine"),
        ({"fp8": "e5m2"}, "allowed: e4m3, hybrid, None"),
        ({"fp8": "hybrid", "transformer_impl": "local"}, "needs TransformerEngine's layers"),
        ({"fp8_recipe": "delayed"}, "allowed: tensorwise, blockwise"),
        ({"recompute_granularity": "some"}, "allowed: selective, full, None"),
        ({"recompute_modules": ("mlp", "moe")}, r"\['moe'\] unknown, allowed: core_attn, mlp, layernorm"),
        ({"recompute_num_layers": 0}, "at least 1, got 0"),
        ({"fp8_recipe": "blockwise"}, r"fp8_recipe 'blockwise' has no effect without layers.fp8 e4m3 or hybrid"),
        ({"recompute_method": "block"}, r"method 'block' has no effect without layers.recompute_granularity full"),
        ({"recompute_num_layers": 2}, r"num_layers 2 has no effect without layers.recompute_granularity full"),
        ({"recompute_modules": ("core_attn",)}, r"has no effect without layers.recompute_granularity selective"),
        ({"recompute_granularity": "selective", "recompute_num_layers": 2}, r"without .*recompute_granularity full"),
        ({"recompute_granularity": "full", "recompute_modules": ("core_attn",)}, r"without .* selective"),
        ({"recompute_granularity": "selective", "recompute_modules": ()}, "selective needs recompute_modules, allowed"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, message) -> None:
    with pytest.raises(ConfigError, match=message):
        LayerConfig(**settings)


@pytest.mark.parametrize(
    ("shape", "tp", "message"),
    [
        ({}, 2, None),
        ({"hidden_size": 72}, 1, r"1 tensor parallel ranks, got hidden_size = 72: leave"),
        ({"ffn_hidden_size": 96}, 4, r"4 tensor parallel ranks, got ffn_hidden_size = 24: leave"),
        ({"kv_channels": 18}, 2, r"got \(num_attention_heads \+ 2 num_query_groups\) kv_channels = 72, num_.* = 36:"),
    ],
)
def test_fp8_wants_widths_that_its_products_take(shape, tp, message, monkeypatch) -> None:
    widths = {"num_layers": 1, "hidden_size": 64, "ffn_hidden_size": 128, "num_attention_heads": 4}
    widths |= {"num_query_groups": 2, "kv_channels": 16, "vocab_size": 32, "max_sequence_length": 16, **shape}
    model = ModelConfig(**widths)
    monkeypatch.setattr(gpt.parallel_state, "get_tensor_model_parallel_world_size", lambda: tp)
    monkeypatch.setattr(gpt, "TransformerConfig", lambda **settings: settings)  # refuses FP8 without TransformerEngine
    if message is None:
        assert transformer_config(model, FULL, layers=LayerConfig(fp8="e4m3"))["fp8"] == "e4m3"
    else:
        with pytest.raises(ConfigError, match=message):
            transformer_config(model, FULL, layers=LayerConfig(fp8="e4m3"))
    assert transformer_config(model, FULL)["fp8"] is None


@pytest.mark.parametrize(("method", "number"), [("uniform", 3), ("uniform", 12), ("uniform", 4), ("block", 4)])
def test_uniform_recompute_wants_chunks_that_come_out_even(method, number) -> None:
    model = dataclasses.replace(preset("tiny"), num_layers=4)
    layers = LayerConfig(recompute_granularity="full", recompute_method=method, recompute_num_layers=number)
    even = {("uniform", 4), ("block", 4)}
    if (method, number) in even:
        assert transformer_config(model, FULL, layers=layers).recompute_num_layers == number
        return
    with pytest.raises(
        ConfigError, match=rf"recompute_num_layers {number} .* 4 layers .* allowed: 1, 2, 4; or .*block"
    ):
        transformer_config(model, FULL, layers=layers)


def test_weights_have_one_name_whatever_the_spec() -> None:
    model = build_gpt_model(preset("tiny"), seed=1)
    names = list(weight_state(model))
    fused = [fused_name(name) for name in names]
    assert sum(a != b for a, b in zip(names, fused, strict=True)) == 2 * len(FUSED_NORMS)
    assert [plain_name(name) for name in fused] == names == [plain_name(name) for name in names]
    assert not any(is_extra_state(name) for name in names) and any(map(is_extra_state, model.state_dict()))


def test_a_model_with_fused_names_gives_and_takes_plain_ones() -> None:
    """A stand-in with the state dict of TransformerEngine's layers, whose extra states are tensors."""

    class Fused(torch.nn.Module):
        def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
            super().__init__()
            self.tensors = tensors

        def state_dict(self, *args, **kwargs):
            return self.tensors

    weights = weight_state(build_gpt_model(preset("tiny"), seed=1))
    fused = {fused_name(name): torch.zeros_like(t) for name, t in weights.items()}
    fused["decoder.final_layernorm._extra_state"] = torch.empty(0, dtype=torch.uint8)
    model = Fused(fused)
    assert weight_state(model).keys() == weights.keys()
    copy_weights(model, weights)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in weight_state(model).items())
