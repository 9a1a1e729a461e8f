"""Megatron-core's own GPTDataset over our files: documents of one sequence stay whole, those of two are torn."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest

from megatron_multiverse.data.preprocess import preprocess_data
from megatron_multiverse.data.sft_dataset import SFTDataset
from megatron_multiverse.data.tokenizers import build_tokenizer
from megatron_multiverse.errors import DataError
from tests.unit.data.test_preprocess import _config, _rows, _write_rows


def documents_of_gpt_dataset(prefix, tokenizer, tmp_path):
    """What GPTDataset shows in one epoch, cut after each end token."""
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.indexed_dataset import IndexedDataset
    from megatron.core.datasets.utils import Split

    indexed = IndexedDataset(str(prefix))
    total = int(indexed.sequence_lengths.sum())
    config = GPTDatasetConfig(
        random_seed=1,
        sequence_length=total - 1,
        split="1,0,0",
        path_to_cache=str(tmp_path / "cache"),
        tokenizer=SimpleNamespace(vocab_size=tokenizer.vocab_size, eod=tokenizer.eod, unique_identifiers={}),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
    )
    indices = np.arange(len(indexed.sequence_lengths), dtype=np.int32)
    sample = GPTDataset(indexed, str(prefix), indices, 1, Split.train, config)[0]
    ids = [*sample["tokens"].tolist(), int(sample["labels"][-1])]
    assert len(ids) == total
    ends = [0, *(k + 1 for k, token in enumerate(ids) if token == tokenizer.eod)]
    return [tuple(ids[start:end]) for start, end in pairwise(ends)]


@pytest.mark.parametrize("one_sequence", [True, False])
def test_gpt_dataset_of_megatron_core(tmp_path, hf_folder, one_sequence):
    rows = _rows(20)
    source = _write_rows(tmp_path / "rows.jsonl", rows)
    config = _config(source, tmp_path / "out", hf_folder, append_eod=True, one_sequence=one_sequence)
    totals = preprocess_data(config).totals
    tokenizer = build_tokenizer("HuggingFaceTokenizer", hf_folder)
    whole = [(*tokenizer.tokenize(row["prompt"]), *tokenizer.tokenize(row["response"]), tokenizer.eod) for row in rows]
    shown = documents_of_gpt_dataset(tmp_path / "out", tokenizer, tmp_path)
    assert (sorted(shown) == sorted(whole)) == one_sequence
    assert totals.prompt_tokens + totals.response_tokens + totals.documents == sum(map(len, whole))


def test_our_trainer_refuses_one_sequence(tmp_path, hf_folder):
    source = _write_rows(tmp_path / "rows.jsonl", _rows(3))
    preprocess_data(_config(source, tmp_path / "out", hf_folder, one_sequence=True))
    vocab = build_tokenizer("HuggingFaceTokenizer", hf_folder).structure_vocab
    with pytest.raises(DataError, match="must hold two sequences"):
        SFTDataset(str(tmp_path / "out"), vocab)
