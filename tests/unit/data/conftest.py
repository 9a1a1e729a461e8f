"""Small tokenizers trained on the fly and a handful of rows, shared by the data tests."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_multiverse.data.tokenizers import MultiverseTokenizer, build_tokenizer
from megatron_multiverse.structure import Block, render

NESTED = Block(("left", "right"), (("count < 3", "two"), ("one", "three")), "inner done")
TRAJECTORY = render(
    (
        "<Think>\nLet's think in parallel.",
        Block(("add the numbers", "check x<y"), (("1 + 2 = 3", NESTED, "so 3"), ("x < y holds",)), "both agree"),
        "Hence 3.\n</Think>",
    )
)
SEQUENTIAL = "<Think>\nOne plus two\nis three.\n</Think>"
CORPUS = [TRAJECTORY, SEQUENTIAL, "What is 1 + 2 ? Think step by step before answering.", "0 1 2 3 4 5 6 7 8 9 é ∑"]


def train_hf(folder: Path) -> Path:
    """A byte-level BPE such as gpt2's, without the tags."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<|end|>", "<|pad|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"eos_token": "<|end|>", "pad_token": {"content": "<|pad|>"}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


GLUED = ("\n", "$x$", "**x**", "(a)", ":")
"""What may follow a label without a blank, and becomes one token with its colon in `train_glued`."""


def train_glued(folder: Path) -> Path:
    """A byte-level BPE cut as Qwen's is, which joins signs and the newlines after them, with the control tokens of a
    chat."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    pattern = Regex(r"\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(pattern, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*CORPUS, *(f"1:{tail}" for tail in GLUED for _ in range(50))], trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    template = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}<|im_start|>a\n"
    config = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def train_sentencepiece(folder: Path, model_type: str = "bpe", **options: object) -> Path:
    """A sentencepiece model without the tags."""
    import sentencepiece

    folder.mkdir(parents=True, exist_ok=True)
    settings = {"normalization_rule_name": "identity", "byte_fallback": True, "vocab_size": 340} | options
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS * 3),
        model_prefix=str(folder / "tokenizer"),
        model_type=model_type,
        minloglevel=2,
        num_threads=1,
        **settings,
    )
    return folder / "tokenizer.model"


@pytest.fixture(scope="session")
def hf_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_hf(tmp_path_factory.mktemp("hf"))


@pytest.fixture(scope="session")
def glued_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_glued(tmp_path_factory.mktemp("glued"))


@pytest.fixture(scope="session")
def sentencepiece_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_sentencepiece(tmp_path_factory.mktemp("sp"))


@pytest.fixture(scope="session", params=["HuggingFaceTokenizer", "SentencePieceTokenizer"])
def tokenizer(request: pytest.FixtureRequest) -> MultiverseTokenizer:
    """Each kind of tokenizer in turn."""
    is_hf = request.param == "HuggingFaceTokenizer"
    model = request.getfixturevalue("hf_folder" if is_hf else "sentencepiece_file")
    return build_tokenizer(request.param, model)
