"""From a published model without tags to a trained one that is whole: by transformers' own reader."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from megatron_multiverse.checkpoints.convert import convert_checkpoint
from megatron_multiverse.checkpoints.convert_config import ConvertConfig
from megatron_multiverse.config import TrainConfig
from megatron_multiverse.data.preprocess import PreprocessConfig, preprocess_data
from megatron_multiverse.data.tokenizers import build_tokenizer
from megatron_multiverse.errors import ConfigError
from megatron_multiverse.structure import TAGS
from megatron_multiverse.training.trainer import train
from tests.unit.checkpoints.hf_folders import save_hf_model, save_tokenizer


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 320 rows whose tokenizer has 259 ids and no tags: room for them, as larger Qwen2.5 have."""
    folder = tmp_path_factory.mktemp("plain")
    save_hf_model(folder, "qwen2", tie_word_embeddings=True)
    save_tokenizer(folder)
    return folder


def preprocess(folder: Path, tokenizer: Path) -> str:
    rows = [{"prompt": f"{k} + 1", "response": f"<Think>\n{k}\n</Think>\n{k + 1}"} for k in range(8)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prefix = str(folder / "data")
    preprocess_data(
        PreprocessConfig(
            input=str(folder / "rows.jsonl"), output_prefix=prefix, tokenizer_model=str(tokenizer), workers=1
        )
    )
    return prefix


def run_config(save: Path, prefix: str, tokenizer: Path, **changes: object) -> TrainConfig:
    data = {"data_prefixes": [prefix], "tokenizer_model": str(tokenizer), "seq_length": 64, "num_workers": 0}
    values = {
        "data": data, "checkpoint": {"save": str(save)}, "train_iters": 2, "optim": {"lr": 1e-2}, "device": "cpu",
    }  # fmt: skip
    return TrainConfig.from_dict({**values, **changes})


def test_a_model_without_tags_is_refused_or_initialised_and_leaves_a_whole_model(plain: Path, tmp_path: Path) -> None:
    prefix, run = preprocess(tmp_path, plain), tmp_path / "run"
    start = {"init_from": str(plain)}
    with pytest.raises(
        ConfigError, match=r"lacks 12 of 12 structure tags, <Think> for one.*add_control_tokens to true"
    ):
        train(run_config(run, prefix, plain, **start))
    train(run_config(run, prefix, plain, **start, add_control_tokens=True))
    record = json.loads((run / "model" / "tokenizer_record.json").read_text())
    assert record["tokenizer_sha256"] == build_tokenizer("HuggingFaceTokenizer", run / "model").fingerprint()
    assert record["tag_ids"] == {tag: 259 + k for k, tag in enumerate(TAGS)} and record["vocab_size"] == 271
    for folder in (run / "model", run / "iter_0000002"):
        theirs = AutoTokenizer.from_pretrained(folder)
        assert {tag: theirs(tag, add_special_tokens=False).input_ids for tag in TAGS} == {
            tag: [number] for tag, number in record["tag_ids"].items()
        }
    trained = load_file(run / "model" / "model.safetensors")["embedding.word_embeddings.weight"]
    for name in ("model", ".", "iter_0000002"):  # each is whole by itself
        exported = tmp_path / f"export-{Path(name).name}"
        convert_checkpoint(ConvertConfig(from_="mcore", to="hf", load=str(run / name), save=str(exported)))
        rows = load_file(exported / "model.safetensors")["model.embed_tokens.weight"]
        assert torch.equal(rows, trained)
        assert AutoTokenizer.from_pretrained(exported)("<Path>", add_special_tokens=False).input_ids == [
            record["tag_ids"]["<Path>"]
        ]
    train(run_config(tmp_path / "second", prefix, run / "model", init_from=str(run / "model")))  # it has its tags


def test_rows_of_tags_are_made_from_the_pieces_of_their_text(plain: Path, tmp_path: Path) -> None:
    prefix = preprocess(tmp_path, plain)
    settings = {"init_from": str(plain), "add_control_tokens": True, "optim": {"lr": 1e-12}, "train_iters": 1}
    train(run_config(tmp_path / "run", prefix, plain, **settings))
    before = load_file(plain / "model.safetensors")["model.embed_tokens.weight"]
    after = load_file(tmp_path / "run" / "model" / "model.safetensors")["embedding.word_embeddings.weight"]
    pieces = AutoTokenizer.from_pretrained(plain)("/Path", add_special_tokens=False).input_ids
    token = 259 + TAGS.index("</Path>")
    torch.testing.assert_close(after[token], before[pieces].mean(dim=0), rtol=0, atol=1e-6)
    assert not torch.equal(before[token], after[token])


def test_a_model_of_another_tokenizer_is_refused(plain: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    save_hf_model(other, "qwen2", tie_word_embeddings=True)
    save_tokenizer(other, extra=3)
    prefix = preprocess(tmp_path, other)
    with pytest.raises(ConfigError, match=r"token 259 is '<Think>' in the tokenizer of init_from .*, but"):
        train(run_config(tmp_path / "run", prefix, other, init_from=str(plain), add_control_tokens=True))


def test_the_option_needs_a_model_to_start_from(plain: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="add_control_tokens has no effect without init_from"):
        run_config(tmp_path, "x", plain, model_preset="tiny", add_control_tokens=True)
