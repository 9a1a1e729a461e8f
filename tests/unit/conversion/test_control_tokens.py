from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_multiverse.conversion.control_tokens import ControlTokenReader
from megatron_multiverse.conversion.hf_io import HFReader
from megatron_multiverse.errors import CheckpointError
from megatron_multiverse.structure import TAGS
from tests.unit.conversion.hf_folders import save_hf_model, save_tokenizer


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("rows, padded", [(259, 320), (300, 300)])
def test_rows_of_tags_are_the_mean_of_their_pieces(tmp_path: Path, tied: bool, rows: int, padded: int) -> None:
    """259 tokens: with 259 rows the matrices grow to a multiple of 64, with 300 rows the spare ones are used."""
    save_hf_model(tmp_path, tie_word_embeddings=tied, vocab_size=rows)
    save_tokenizer(tmp_path)
    plain, reader = HFReader(tmp_path), ControlTokenReader(tmp_path)
    assert reader.plan.tag_ids == {tag: 259 + k for k, tag in enumerate(TAGS)}
    assert reader.plan.record() == {
        "vocab_size": 271, "padded_vocab_size": padded, "tag_ids": reader.plan.tag_ids
    }  # fmt: skip
    names = ["model.embed_tokens.weight"] + ([] if tied else ["lm_head.weight"])
    assert [n for n in ("model.embed_tokens.weight", "lm_head.weight") if n in plain.names()] == names
    byte = {text: k for k, text in enumerate(sorted(_alphabet()))}
    for name in names:
        old, new = plain.read(name), reader.read(name)
        assert new.shape == reader.location(name).shape == (padded, 32)
        assert torch.equal(new[:259], old[:259])
        for tag in TAGS:
            want = old[[byte[c] for c in tag[1:-1]]].mean(0)
            torch.testing.assert_close(new[reader.plan.tag_ids[tag]], want)
        assert torch.equal(new[271:], old[271:] if rows == 300 else torch.zeros(padded - 271, 32))
    other = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(reader.read(other), plain.read(other)) and reader.location(other) == plain.location(other)


def test_a_checkpoint_with_tags_is_left_as_it_is(tmp_path: Path) -> None:
    """As Multiverse-32B: the tags stand behind the vocabulary, rows are rounded up to a multiple of 64."""
    save_hf_model(tmp_path, vocab_size=320)
    save_tokenizer(tmp_path, tags=TAGS)
    plain, reader = HFReader(tmp_path), ControlTokenReader(tmp_path)
    assert (reader.plan.vocab_size, reader.plan.padded_vocab_size, reader.plan.pieces) == (271, 320, {})
    for name in plain.names():
        assert torch.equal(reader.read(name), plain.read(name))


def test_the_extended_tokenizer_is_read_by_transformers(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    save_hf_model(tmp_path)
    save_tokenizer(tmp_path)
    reader = ControlTokenReader(tmp_path)
    reader.tokenizer.save(tmp_path / "out")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "out")
    text = "<Parallel>\n<Goal>\n a b</Goal>"
    assert loaded(text)["input_ids"] == reader.tokenizer.tokenize(text)
    assert loaded.convert_tokens_to_ids(list(TAGS)) == list(reader.plan.tag_ids.values())
    assert loaded.apply_chat_template([{"role": "user", "content": "q"}], tokenize=False) == (
        "<|im_start|>user\nq<|im_end|>\n"
    )


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    save_hf_model(tmp_path, vocab_size=256)
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json"):
        ControlTokenReader(tmp_path)
    save_tokenizer(tmp_path)
    with pytest.raises(CheckpointError, match=r"ids up to 258, but .* 256 rows"):
        ControlTokenReader(tmp_path)


def _alphabet() -> list[str]:
    from tokenizers import pre_tokenizers

    return list(pre_tokenizers.ByteLevel.alphabet())
