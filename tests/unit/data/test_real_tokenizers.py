"""Published tokenizers: tags are single tokens, transformers reads what was saved, and text gets one verdict."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_multiverse.data.tokenizers import HuggingFaceTokenizer
from megatron_multiverse.structure import TAGS, parse
from tests.unit.data.conftest import TRAJECTORY


@pytest.fixture(scope="module")
def tokenizer(real_tokenizer: Path) -> HuggingFaceTokenizer:
    return HuggingFaceTokenizer(real_tokenizer)


def test_tags_and_newlines_beside_them_are_single_tokens(tokenizer: HuggingFaceTokenizer) -> None:
    vocab = tokenizer.structure_vocab
    for tag, token in zip(TAGS, vocab.tag_ids, strict=True):
        assert tokenizer.tokenize(f"x {tag}\n<Path>") == [
            *tokenizer.tokenize("x "),
            token,
            vocab.newline_id,
            vocab.tag_ids[TAGS.index("<Path>")],
        ]
    ids = tokenizer.tokenize(TRAJECTORY)
    assert tokenizer.detokenize(ids) == TRAJECTORY
    assert len(list(parse(ids, vocab).walk())) == 2


def test_transformers_reads_a_saved_tokenizer_with_its_tags(tokenizer: HuggingFaceTokenizer, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert len(theirs) == tokenizer.vocab_size
    assert theirs.convert_tokens_to_ids(list(TAGS)) == list(tokenizer.structure_vocab.tag_ids)
    assert theirs.encode(TRAJECTORY, add_special_tokens=False) == tokenizer.tokenize(TRAJECTORY)
    again = HuggingFaceTokenizer(tmp_path)
    assert again.fingerprint() == tokenizer.fingerprint()
    assert again.eod == tokenizer.eod == theirs.eos_token_id
