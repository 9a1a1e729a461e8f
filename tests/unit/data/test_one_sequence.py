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


def gpt_dataset(prefix, tokenizer, cache):
    """megatron-core's GPTDataset of one epoch, all of it in one sample."""
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.indexed_dataset import IndexedDataset
    from megatron.core.datasets.utils import Split

    indexed = IndexedDataset(str(prefix))
    config = GPTDatasetConfig(
        random_seed=1,
        sequence_length=int(indexed.sequence_lengths.sum()) - 1,
        blend=([str(prefix)], None),
        split="1,0,0",
        path_to_cache=cache,
        tokenizer=SimpleNamespace(vocab_size=tokenizer.vocab_size, eod=tokenizer.eod, unique_identifiers={}),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
    )
    indices = np.arange(len(indexed.sequence_lengths), dtype=np.int32)
    return GPTDataset(indexed, str(prefix), indices, 1, Split.train, config)


def documents_of_gpt_dataset(prefix, tokenizer, tmp_path):
    """What GPTDataset shows in one epoch, cut after each end token."""
    dataset = gpt_dataset(prefix, tokenizer, str(tmp_path / "cache"))
    sample = dataset[0]
    ids = [*sample["tokens"].tolist(), int(sample["labels"][-1])]
    assert len(ids) == int(dataset.dataset.sequence_lengths.sum())
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


def test_an_index_of_earlier_data_is_named(tmp_path, hf_folder, caplog):
    """megatron-core would read the new data by it (findings/mcore_gptdataset_reads_new_data_by_an_old_index.sh)."""
    source = _write_rows(tmp_path / "rows.jsonl", _rows(3))
    preprocess_data(_config(source, tmp_path / "out", hf_folder, append_eod=True, one_sequence=True))
    gpt_dataset(tmp_path / "out", build_tokenizer("HuggingFaceTokenizer", hf_folder), cache=None)
    index = tmp_path / "out" / "cache" / "GPTDataset_indices"
    assert any(index.iterdir()) and str(index) not in caplog.text
    _write_rows(tmp_path / "rows.jsonl", _rows(5))
    preprocess_data(_config(source, tmp_path / "out", hf_folder, append_eod=True, one_sequence=True))
    assert str(index) in caplog.text and "Delete it" in caplog.text


def test_our_trainer_refuses_one_sequence(tmp_path, hf_folder):
    source = _write_rows(tmp_path / "rows.jsonl", _rows(3))
    preprocess_data(_config(source, tmp_path / "out", hf_folder, one_sequence=True))
    vocab = build_tokenizer("HuggingFaceTokenizer", hf_folder).structure_vocab
    with pytest.raises(DataError, match="must hold two sequences"):
        SFTDataset(str(tmp_path / "out"), vocab)
