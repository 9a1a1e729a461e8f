#!/usr/bin/env bash
# megatron-core 0.16.1 (PyPI; 0.19.2 does the same), torch 2.13.0 on the CPU.
#
# Expected: the index of samples that GPTDataset keeps in path_to_cache (by default PREFIX/cache/GPTDataset_indices)
#   belongs to the data: when PREFIX.bin and PREFIX.idx are written anew, it is made anew, or found not to fit and refused.
# Seen: its name is a hash of settings and path, and nothing compares it with the data. Data preprocessed again under the
#   same name are read through the old index, silently: of twice as many documents the second half is never seen, and
#   where documents have become shorter, samples come out half empty, filled up with padding that bears no loss.
# Output seen:
#   40 documents of 8 tokens: 40 different documents in 80 samples
#   80 other documents of 8 tokens, the same prefix: 40 different documents in 80 samples, without the cache 79
#   80 documents of 4 tokens, the same prefix: 4 of 8 tokens of a sample bear loss, without the cache 8
# Deleting the folder GPTDataset_indices, or another name for other data, avoids it.
#
# Exits with 0 if the old index is used, with another status if that has changed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 megatron-core==0.16.1 numpy setuptools \
  2> "$work/errors" || { cat "$work/errors"; exit 1; }
cat > "$work/index.py" <<'PY'
import sys
from types import SimpleNamespace

import numpy
import torch
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

folder = sys.argv[1]
tokenizer = SimpleNamespace(eod=0, pad=-1, vocab_size=1000, unique_identifiers={"class": "none"})


def write(first, documents, tokens):
    """Document k holds the token first + k alone, so every token says where it comes from."""
    builder = IndexedDatasetBuilder(f"{folder}/data.bin", dtype=numpy.int32)
    for number in range(first, first + documents):
        builder.add_document(torch.full((tokens,), number, dtype=torch.int32), [tokens])
    builder.finalize(f"{folder}/data.idx")


def samples(cache):
    config = GPTDatasetConfig(
        random_seed=1, sequence_length=8, blend=([f"{folder}/data"], None), split="100,0,0", path_to_cache=cache,
        tokenizer=tokenizer, reset_position_ids=False, reset_attention_mask=False, eod_mask_loss=False,
    )  # fmt: skip
    dataset = BlendedMegatronDatasetBuilder(GPTDataset, [80, 0, 0], lambda: True, config).build()[0]
    return [dataset[k] for k in range(80)]


def different(found):
    return len({int(sample["tokens"][0]) for sample in found})


def with_loss(found):
    return max(int(sample["loss_mask"].sum()) for sample in found)


write(100, 40, 8)
seen = [different(samples(f"{folder}/cache"))]
print(f"40 documents of 8 tokens: {seen[0]} different documents in 80 samples")
write(200, 80, 8)
seen += [different(samples(f"{folder}/cache")), different(samples(f"{folder}/fresh1"))]
print(
    f"80 other documents of 8 tokens, the same prefix: {seen[1]} different documents in 80 samples, "
    f"without the cache {seen[2]}"
)
write(300, 80, 4)
seen += [with_loss(samples(f"{folder}/cache")), with_loss(samples(f"{folder}/fresh2"))]
print(f"80 documents of 4 tokens, the same prefix: {seen[3]} of 8 tokens of a sample bear loss, without the cache {seen[4]}")
sys.exit(0 if seen[0] == seen[1] == 40 and seen[2] > 70 and seen[3] < 8 and seen[4] == 8 else 1)
PY
"$work/venv/bin/python" -W ignore "$work/index.py" "$work" 2> "$work/errors" || { tail -3 "$work/errors"; exit 1; }
