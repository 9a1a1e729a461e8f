"""The tokenizer in a checkpoint is the one that it was written with."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from megatron_multiverse.checkpoints.own_tokenizer import tokenizer_of, tokenizer_record
from megatron_multiverse.checkpoints.run_files import TOKENIZER_RECORD_FILE
from megatron_multiverse.checkpoints.sources import open_checkpoint
from megatron_multiverse.data.tokenizers import HuggingFaceTokenizer
from megatron_multiverse.errors import ConfigError

MODEL = Path(__file__).parents[3] / "examples" / "quickstart" / "model"


def test_a_tokenizer_that_was_exchanged_is_refused(tmp_path: Path) -> None:
    folder = shutil.copytree(MODEL, tmp_path / "model")
    record = tokenizer_record(HuggingFaceTokenizer(folder))
    known = HuggingFaceTokenizer(MODEL)
    (folder / TOKENIZER_RECORD_FILE).write_text(json.dumps(record))
    own = tokenizer_of(open_checkpoint(folder), known)
    assert own is not None and own is not known and own.path == folder
    first, second = list(record["tag_ids"])[:2]
    swapped = {**record["tag_ids"], first: record["tag_ids"][second], second: record["tag_ids"][first]}
    for name, value in (("eod", 1), ("vocab_size", 5), ("tag_ids", swapped)):
        (folder / TOKENIZER_RECORD_FILE).write_text(json.dumps({**record, name: value}))
        with pytest.raises(ConfigError, match=f"{TOKENIZER_RECORD_FILE} has another {name}"):
            tokenizer_of(open_checkpoint(folder), known)


def test_a_checkpoint_without_a_tokenizer_has_none_and_a_known_one_is_not_read_again(tmp_path: Path) -> None:
    known = HuggingFaceTokenizer(MODEL)
    assert tokenizer_of(open_checkpoint(MODEL), known) is known
    for name in ("config.json", "model.safetensors"):
        shutil.copy(MODEL / name, tmp_path / name)
    assert tokenizer_of(open_checkpoint(tmp_path), known) is None
