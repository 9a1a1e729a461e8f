from __future__ import annotations

import gc

import pytest
import torch

from megatron_multiverse.errors import ConfigError, StructureError
from megatron_multiverse.model import transformers_attention
from megatron_multiverse.model.attention import LayoutParams
from megatron_multiverse.model.families import qwen3
from megatron_multiverse.model.gpt import build_gpt_model
from megatron_multiverse.model.transformers_attention import model_inputs, register_attention
from megatron_multiverse.structure import TAGS, StructureVocab
from tests.copied_weights import copy_weights
from tests.unit.model.hf import hf_model, mcore_weights

VOCAB = StructureVocab.from_pieces(["a", *TAGS, "\n", "1:", "2:", "x", "y"])
TAG = {name: i + 1 for i, name in enumerate(TAGS)}
NEWLINE, ONE, TWO, X, Y = 13, 14, 15, 16, 17


def response() -> list[int]:
    def outline(label: int) -> list[int]:
        return [TAG["<Outline>"], NEWLINE, label, X, NEWLINE, TAG["</Outline>"], NEWLINE]

    def path(label: int, text: list[int]) -> list[int]:
        return [NEWLINE, TAG["<Path>"], NEWLINE, label, *text, NEWLINE, TAG["</Path>"]]

    return [
        X, TAG["<Parallel>"], NEWLINE, TAG["<Goal>"], NEWLINE, *outline(ONE), *outline(TWO), TAG["</Goal>"],
        *path(ONE, [X, Y, Y]), *path(TWO, [Y]), NEWLINE, TAG["<Conclusion>"], NEWLINE, Y, NEWLINE,
        TAG["</Conclusion>"], NEWLINE, TAG["</Parallel>"], X, Y,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def models():
    register_attention()
    config = qwen3(
        num_layers=2, hidden_size=32, ffn_hidden_size=48, num_attention_heads=4, num_query_groups=2, kv_channels=16,
        vocab_size=18, max_sequence_length=128,
    )  # fmt: skip
    torch.manual_seed(0)
    hf = hf_model("qwen3", config)
    for parameter in hf.parameters():
        torch.nn.init.normal_(parameter, 0.0 if parameter.ndim > 1 else 1.0, 0.2)
    hf.set_attn_implementation("multiverse")
    ours = build_gpt_model(config)
    copy_weights(ours, mcore_weights(hf, config))
    return hf, ours


def test_loss_and_gradients_equal_our_model(models) -> None:
    hf, ours = models
    hf.zero_grad()
    ours.zero_grad()
    inputs = model_inputs([0, 0], response(), VOCAB)
    got = hf(**inputs)
    got.loss.backward()
    ids, labels = inputs["input_ids"], inputs["labels"]
    params = LayoutParams.from_labels(inputs["r"])
    per_token = ours(ids, inputs["position_ids"], None, packed_seq_params=params, labels=labels.clamp(0).roll(-1, 1))
    trained = (labels != -100).roll(-1, 1)
    assert not trained[0, -1] and 10 < trained.sum() < ids.numel()
    want = per_token[trained].mean()
    want.backward()
    torch.testing.assert_close(got.loss, want, rtol=1e-6, atol=0)
    torch.testing.assert_close(
        hf.model.embed_tokens.weight.grad, ours.embedding.word_embeddings.weight.grad, rtol=1e-5, atol=1e-6
    )


def test_logits_equal_our_model_and_differ_from_plain_causal(models) -> None:
    hf, ours = models
    inputs = model_inputs([0, 0], response(), VOCAB)
    del inputs["labels"]
    with torch.no_grad():
        got = hf(**inputs).logits
        params = LayoutParams.from_labels(inputs["r"])
        want = ours(inputs["input_ids"], inputs["position_ids"], None, packed_seq_params=params)
        hf.set_attn_implementation("sdpa")
        causal = hf(inputs["input_ids"], use_cache=False).logits
        hf.set_attn_implementation("multiverse")
    scale = want.abs().max()
    assert (got - want).abs().max() <= 1e-5 * scale
    assert (causal - want).abs().max() > 1e-2 * scale


def test_a_layout_lives_as_long_as_the_labels_of_its_pass(models) -> None:
    hf, _ = models
    inputs = model_inputs([0, 0], response(), VOCAB)
    before = len(transformers_attention._layouts)
    with torch.no_grad():
        hf(**inputs)
    assert len(transformers_attention._layouts) == before + 1
    del inputs
    gc.collect()
    assert len(transformers_attention._layouts) == before


def test_checkpointed_training_gives_the_same_gradient(models) -> None:
    hf, _ = models
    inputs = model_inputs([0, 0], response(), VOCAB)
    gradients = []
    for checkpointed in (False, True):
        hf.train()
        (hf.gradient_checkpointing_enable if checkpointed else hf.gradient_checkpointing_disable)()
        hf.zero_grad()
        hf(**inputs).loss.backward()
        gradients.append(hf.model.layers[0].self_attn.q_proj.weight.grad.clone())
    hf.gradient_checkpointing_disable()
    hf.eval()
    assert gradients[0].abs().max() > 0
    torch.testing.assert_close(*gradients, rtol=0, atol=0)


def test_what_the_rule_does_not_have_is_refused(models) -> None:
    hf, _ = models
    inputs = model_inputs([0, 0], response(), VOCAB)
    r = inputs.pop("r")
    with pytest.raises(ConfigError, match="needs r"):
        hf(**inputs)
    with pytest.raises(ConfigError, match="over the whole sequence"):
        hf(**inputs, r=r[:, 1:])
    padding = torch.ones_like(r)
    assert torch.isfinite(hf(**inputs, r=r, attention_mask=padding).loss)
    padding[0, 0] = 0
    with pytest.raises(ConfigError, match="padding"):
        hf(**inputs, r=r, attention_mask=padding)
    with pytest.raises(StructureError):
        model_inputs([0], [TAG["</Path>"]], VOCAB)


def test_labels_filled_anew_in_place_give_another_mask(models) -> None:
    """Preallocated batches: torch counts some of these changes and not others, so nothing may rely on that count."""
    hf, _ = models
    blocks = model_inputs([0, 0], response(), VOCAB)
    plain = blocks | {"r": torch.arange(blocks["r"].shape[1])[None]}
    with torch.no_grad():
        want = {name: hf(**inputs).logits for name, inputs in (("blocks", blocks), ("plain", plain))}
    assert not torch.allclose(want["blocks"], want["plain"], atol=1e-3)
    labels = blocks["r"].numpy().copy()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            buffer = blocks | {"r": torch.from_numpy(labels)}
            for name, source in (("plain", plain), ("blocks", blocks), ("plain", plain)):
                labels[:] = source["r"].numpy()
                torch.testing.assert_close(hf(**buffer).logits, want[name], rtol=0, atol=0)
            for name, source in (("blocks", blocks), ("plain", plain)):
                buffer["r"].copy_(source["r"])
                torch.testing.assert_close(hf(**buffer).logits, want[name], rtol=0, atol=0)


def test_positions_that_were_left_out_are_refused(models) -> None:
    hf, _ = models
    inputs = model_inputs([0, 0], response(), VOCAB)
    del inputs["position_ids"]
    with pytest.raises(ConfigError, match="position_ids count from 0 to s - 1, but r says"):
        hf(**inputs)
    hf(**inputs | {"r": torch.arange(inputs["r"].shape[1])[None]})  # plain causal text counts so
