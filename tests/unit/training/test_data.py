"""From the data configuration to loaders: the tokenizer must be the one that wrote the ids."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_multiverse.config import DataConfig
from megatron_multiverse.data.preprocess import PreprocessConfig, preprocess_data
from megatron_multiverse.data.tokenizers import build_tokenizer
from megatron_multiverse.errors import ConfigError, DataError
from megatron_multiverse.training.data import build_loaders, check_tokenizer

TOKENIZER = Path(__file__).parents[3] / "examples" / "quickstart" / "model"


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("set")
    rows = [{"prompt": f"{k} + 1 = ", "response": str(k + 1)} for k in range(8)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = PreprocessConfig(
        input=str(folder / "rows.jsonl"), output_prefix=str(folder / "set"), tokenizer_model=str(TOKENIZER), workers=1
    )
    preprocess_data(options)
    return str(folder / "set")


def other_tokenizer(folder: Path) -> Path:
    tokenizer = build_tokenizer("HuggingFaceTokenizer", TOKENIZER)
    tokenizer.save(folder)
    file = folder / "tokenizer.json"
    values = json.loads(file.read_text())
    values["normalizer"] = {"type": "Lowercase"}  # the same ids, but other ones for the same text
    file.write_text(json.dumps(values))
    return folder


def data_config(prefix: str, tokenizer: Path) -> DataConfig:
    return DataConfig(data_prefixes=(prefix,), tokenizer_model=str(tokenizer), seq_length=64, num_workers=0)


def test_the_tokenizer_that_wrote_the_data_is_accepted_from_any_folder(prefix: str, tmp_path: Path) -> None:
    build_tokenizer("HuggingFaceTokenizer", TOKENIZER).save(tmp_path)
    loader, valid = build_loaders(data_config(prefix, tmp_path), 1, 320)
    assert next(iter(loader))["input_ids"].shape == (1, 64)
    assert valid is None


def test_another_tokenizer_is_refused(prefix: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"was made with the tokenizer .*name the same tokenizer"):
        build_loaders(data_config(prefix, other_tokenizer(tmp_path)), 1, 320)


def test_a_damaged_manifest_is_named_and_a_missing_one_is_told(
    prefix: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = build_tokenizer("HuggingFaceTokenizer", TOKENIZER)
    (tmp_path / "set_manifest.json").write_text('{"key": ')
    with pytest.raises(DataError, match=r"set_manifest\.json is damaged"):
        check_tokenizer(str(tmp_path / "set"), tokenizer, "x")
    check_tokenizer(str(tmp_path / "none"), tokenizer, "x")
    assert "cannot tell whether" in caplog.text
