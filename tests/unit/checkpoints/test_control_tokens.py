from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer

from megatron_multiverse.checkpoints.control_tokens import ControlTokenSource
from megatron_multiverse.checkpoints.convert import convert_checkpoint
from megatron_multiverse.checkpoints.convert_config import ConvertConfig
from megatron_multiverse.checkpoints.formats.hf import HFSource
from megatron_multiverse.checkpoints.load import load_checkpoint
from megatron_multiverse.data.tokenizers import HuggingFaceTokenizer
from megatron_multiverse.errors import CheckpointError, ConfigError
from megatron_multiverse.model.weights import save_model
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


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    """A model folder as training leaves it: 259 tokens and the tags in 320 rows, no tokenizer beside it."""
    save_hf_model(tmp_path / "hf", tie_word_embeddings=True)
    save_tokenizer(tmp_path / "hf")
    model, config = load_checkpoint(tmp_path / "hf")
    with torch.no_grad():
        model.embedding.word_embeddings.weight[259:268] += 1.0
        model.embedding.word_embeddings.weight[268:271] = 0.0  # never seen in training: padding of the checkpoint
    save_model(model, config, tmp_path / "run/model")
    return tmp_path / "run/model"


def exported(load: Path, save: Path, **options: Any) -> torch.Tensor:
    options = {"from_": "mcore", "to": "hf", **options}
    convert_checkpoint(ConvertConfig(load=str(load), save=str(save), **options))
    return load_file(save / "model.safetensors")["model.embed_tokens.weight"]


def test_trained_rows_are_not_overwritten_unasked(
    trained: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plain, before = str(tmp_path / "hf"), load_file(trained / "model.safetensors")["embedding.word_embeddings.weight"]
    means = exported(tmp_path / "hf", tmp_path / "fresh", from_="hf", add_control_tokens=True)
    options = {"tokenizer_model": plain, "add_control_tokens": True}
    kept = exported(trained, tmp_path / "kept", **options)
    assert torch.equal(kept[:268], before[:268]) and torch.equal(kept[268:271], means[268:271])
    assert "rows 259 to 270, which become those of the tags: they are kept" in caplog.text
    assert HuggingFaceTokenizer(tmp_path / "kept").structure_vocab.tag_ids == tuple(range(259, 271))
    assert torch.equal(exported(trained, tmp_path / "anew", tag_rows="mean", **options)[259:271], means[259:271])
    caplog.clear()
    assert torch.equal(exported(trained, tmp_path / "plain", tokenizer_model=plain), before)
    assert "--add-control-tokens adds them to the tokenizer and keeps the trained rows" in caplog.text


def test_the_tokenizer_of_a_run_is_exported_with_any_of_its_checkpoints(trained: Path, tmp_path: Path) -> None:
    """RUN/model has it; so have exports of RUN and of RUN/iter_0000002."""
    ControlTokenSource(HFSource(tmp_path / "hf")).tokenizer.save(trained)
    run = trained.parent
    convert_checkpoint(ConvertConfig(from_="mcore", to="mcore", load=str(trained), save=str(tmp_path / "mcore")))
    (tmp_path / "mcore/release").rename(run / "iter_0000002")
    (tmp_path / "mcore/model_config.json").rename(run / "iter_0000002/model_config.json")
    (run / "latest_checkpointed_iteration.txt").write_text("2")
    (run / "config.json").write_text('{"train_iters": 2}')
    for number, load in enumerate((run, run / "iter_0000002", run / "model")):
        save = tmp_path / f"export{number}"
        exported(load, save)
        loaded = AutoTokenizer.from_pretrained(save)
        assert loaded.convert_tokens_to_ids(list(TAGS)) == list(range(259, 271))
        assert loaded("<Goal>", add_special_tokens=False)["input_ids"] == [259 + TAGS.index("<Goal>")]


def test_weights_that_were_only_converted_are_not_trained(tmp_path: Path) -> None:
    """Their spare rows, which published models fill with anything, are made from the pieces as ever."""
    save_hf_model(tmp_path / "hf", tie_word_embeddings=True)
    save_tokenizer(tmp_path / "hf")
    means = exported(tmp_path / "hf", tmp_path / "fresh", from_="hf", add_control_tokens=True)
    convert_checkpoint(ConvertConfig(from_="hf", to="mcore", load=str(tmp_path / "hf"), save=str(tmp_path / "mcore")))
    assert torch.equal(exported(tmp_path / "mcore", tmp_path / "out", add_control_tokens=True), means)


def test_tokenizer_and_rows_are_held_against_each_other(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_hf_model(tmp_path / "hf")
    convert = {"from_": "hf", "to": "mcore", "load": str(tmp_path / "hf")}
    convert_checkpoint(ConvertConfig(save=str(tmp_path / "mcore"), **convert))
    assert "has no tokenizer" not in caplog.text  # only an export is of no use without one
    exported(tmp_path / "mcore", tmp_path / "bare")
    assert "has no tokenizer: none is exported" in caplog.text
    save_tokenizer(tmp_path / "large", extra=100)
    with pytest.raises(CheckpointError, match=r"ids up to 358, but the vocabulary matrices have 320 rows"):
        exported(tmp_path / "mcore", tmp_path / "out", tokenizer_model=str(tmp_path / "large"))
    with pytest.raises(ConfigError, match="--tokenizer-model /no/such/folder is no folder with a tokenizer"):
        exported(tmp_path / "mcore", tmp_path / "out", tokenizer_model="/no/such/folder")
    for size in (200, 321):
        with pytest.raises(ConfigError, match=f"--vocab-size is {size}, but conversion.json says 320"):
            exported(tmp_path / "mcore", tmp_path / "out", vocab_size=size)
    assert not (tmp_path / "out.partial").exists()


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    save_hf_model(tmp_path, vocab_size=256)
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json"):
        ControlTokenSource(HFSource(tmp_path))
    save_tokenizer(tmp_path)
    with pytest.raises(CheckpointError, match=r"ids up to 258, but .* 256 rows: tokenizer"):
        ControlTokenSource(HFSource(tmp_path))
