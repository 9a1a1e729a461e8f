from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tokenizers import pre_tokenizers

from megatron_multiverse.checkpoints.control_tokens import ControlTokenSource
from megatron_multiverse.checkpoints.formats.hf import HFSource
from megatron_multiverse.errors import CheckpointError
from megatron_multiverse.structure import TAGS
from tests.unit.checkpoints.hf_folders import save_hf_model, save_tokenizer


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("rows, padded", [(259, 320), (300, 300)])
def test_rows_of_tags_are_the_mean_of_their_pieces(tmp_path: Path, tied: bool, rows: int, padded: int) -> None:
    """259 tokens: with 259 rows the matrices grow to a multiple of 64, with 300 rows the spare ones are used."""
    save_hf_model(tmp_path, tie_word_embeddings=tied, vocab_size=rows)
    save_tokenizer(tmp_path)
    plain = HFSource(tmp_path)
    source = ControlTokenSource(plain)
    ids = {tag: 259 + k for k, tag in enumerate(TAGS)}
    assert source.plan.record() == {"vocab_size": 271, "padded_vocab_size": padded, "tag_ids": ids}
    assert source.config.vocab_size == padded
    byte = {text: k for k, text in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    grown = 0
    for before, after in zip(plain.entries(), source.entries(), strict=True):
        old, new = plain.read(before), source.read(after)
        assert new.shape == after.shape and source.dtype(after) == new.dtype
        if before.rule != "vocab":
            assert torch.equal(old, new)
            continue
        grown += 1
        assert torch.equal(new[:259], old[:259])
        for tag in TAGS:
            torch.testing.assert_close(new[ids[tag]], old[[byte[c] for c in tag[1:-1]]].mean(0))
        assert torch.equal(new[271:], old[271:] if rows == 300 else torch.zeros(padded - 271, 32))
    assert grown == (1 if tied else 2)


def test_a_checkpoint_with_tags_is_left_as_it_is(tmp_path: Path) -> None:
    """As Multiverse-32B: the tags stand after the vocabulary, rows are rounded up to a multiple of 64."""
    save_hf_model(tmp_path, vocab_size=320)
    save_tokenizer(tmp_path, tags=TAGS)
    plain = HFSource(tmp_path)
    source = ControlTokenSource(plain)
    assert (source.plan.vocab_size, source.plan.padded_vocab_size, source.plan.pieces) == (271, 320, {})
    assert source.config == plain.config
    for before, after in zip(plain.entries(), source.entries(), strict=True):
        assert torch.equal(plain.read(before), source.read(after))


def test_the_extended_tokenizer_is_read_by_transformers(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    save_hf_model(tmp_path)
    save_tokenizer(tmp_path)
    source = ControlTokenSource(HFSource(tmp_path))
    source.tokenizer.save(tmp_path / "out")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "out")
    text = "<Parallel>\n<Goal>\n a b</Goal>"
    assert loaded(text)["input_ids"] == source.tokenizer.tokenize(text)
    assert loaded.convert_tokens_to_ids(list(TAGS)) == list(source.plan.tag_ids.values())
    assert loaded.apply_chat_template([{"role": "user", "content": "q"}], tokenize=False) == (
        "<|im_start|>user\nq<|im_end|>\n"
    )


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    save_hf_model(tmp_path, vocab_size=256)
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json"):
        ControlTokenSource(HFSource(tmp_path))
    save_tokenizer(tmp_path)
    with pytest.raises(CheckpointError, match=r"ids up to 258, but .* 256 rows"):
        ControlTokenSource(HFSource(tmp_path))
