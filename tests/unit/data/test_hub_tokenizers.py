"""Tokenizers by their name on the hub: their files count, not the model beside them. Nothing asks the network."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_multiverse.data.tokenizers import HuggingFaceTokenizer
from megatron_multiverse.errors import ConfigError

TEXT = "The year 1234 has 365 days"
TEMPLATE = "{% for m in messages %}[{{ m.content }}]{% endfor %}"
QWEN2 = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}
"""Beside it, transformers 5 makes every tokenizer a Qwen2Tokenizer, which cuts a number into its digits."""


@pytest.fixture
def snapshot(tmp_path, monkeypatch) -> Path:
    """The files of the model "org/name" in the cache of the hub, which is all there is: numbers are whole tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    folder = tmp_path / "models--org--name" / "snapshots" / ("0" * 40)
    folder.mkdir(parents=True)
    (refs := tmp_path / "models--org--name" / "refs").mkdir()
    (refs / "main").write_text(folder.name)

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    options = {"special_tokens": ["<|end|>", "<|pad|>"], "initial_alphabet": alphabet, "show_progress": False}
    tokenizer.train_from_iterator([TEXT] * 20, trainers.BpeTrainer(vocab_size=300, **options))
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"eos_token": "<|end|>", "pad_token": "<|pad|>", "tokenizer_class": "TokenizersBackend"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    (folder / "config.json").write_text(json.dumps(QWEN2))
    return folder


def test_hub_name_gives_the_tokenizer_of_its_files(snapshot):
    by_name, by_folder = HuggingFaceTokenizer("org/name"), HuggingFaceTokenizer(snapshot)
    assert [by_name.id_to_text[token] for token in by_name.tokenize(TEXT)] == [
        *("The", " year", " 1234", " has", " 365", " days")
    ]
    assert by_name.fingerprint() == by_folder.fingerprint()  # chat template included
    assert (by_name.eod, by_name.pad) == (by_folder.eod, by_folder.pad) == (0, 1)
    assert by_name.render_chat("hi") == "[hi]"


def test_hub_name_that_is_not_in_the_cache_is_refused(snapshot):
    with pytest.raises(ConfigError, match=r"no Hugging Face tokenizer at org/other.*HF_HUB_OFFLINE"):
        HuggingFaceTokenizer("org/other")


@pytest.mark.parametrize("place", ["name", "folder"])
@pytest.mark.parametrize("model_type", ["gpt2", "qwen2"])
def test_without_tokenizer_json_another_class_than_the_declared_one_is_said(snapshot, place, model_type, caplog):
    from tokenizers import Tokenizer

    Tokenizer.from_file(str(snapshot / "tokenizer.json")).model.save(str(snapshot))  # vocab.json and merges.txt
    (snapshot / "tokenizer.json").unlink()
    special = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|end|>")
    (snapshot / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer"} | special))
    (snapshot / "config.json").write_text(json.dumps({"model_type": model_type}))
    tokenizer = HuggingFaceTokenizer("org/name" if place == "name" else snapshot)
    is_own = len(tokenizer.tokenize(TEXT)) == 6
    assert is_own or model_type == "qwen2"
    assert (
        "takes the tokenizer of its config.json, Qwen2Tokenizer, in place of GPT2Tokenizer" in caplog.text
    ) != is_own
