#!/usr/bin/env bash
# megatron-core 0.16.1 (PyPI; 0.19.2 does the same), torch 2.13.0 on the CPU.
#
# Expected: a run that is resumed with more iterations goes on where it stopped: with the same data and seed the first
#   samples of a GPTDataset are the same however many are asked for, and each epoch has every document once.
# Seen: documents are shuffled over all epochs at once, so the number of samples decides the whole order as soon as it is
#   more than one epoch. Megatron asks for train_iters * global_batch_size samples and skips those consumed. A run of two
#   epochs resumed for a third reads, after the first two, the last part of another order: after three epochs some
#   documents were seen once and some five times. Nothing warns. Within one epoch the order stays.
# Output seen:
#   less than an epoch, then a whole one: the first 20 samples are the same
#   two epochs, then three: the first 80 samples are others
#   three epochs in one run: documents seen 2 times: 1, 3 times: 38, 4 times: 1
#   two epochs, resumed for the third: documents seen 1 times: 1, 2 times: 11, 3 times: 17, 4 times: 9, 5 times: 2
#
# Exits with 0 if that is so, with another status if it has changed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 megatron-core==0.16.1 numpy setuptools \
  2> "$work/errors" || { cat "$work/errors"; exit 1; }
cat > "$work/order.py" <<'PY'
import sys
from collections import Counter
from types import SimpleNamespace

import numpy
import torch
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

prefix = f"{sys.argv[1]}/data"
tokenizer = SimpleNamespace(eod=0, pad=-1, vocab_size=1000, unique_identifiers={"class": "none"})
builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=numpy.int32)
for number in range(40):  # 40 documents of one sample each, all of the same token
    builder.add_document(torch.full((8,), 100 + number, dtype=torch.int32), [8])
builder.finalize(f"{prefix}.idx")


def order(samples):
    """Document of each of the first samples, of a dataset made for so many."""
    config = GPTDatasetConfig(
        random_seed=1, sequence_length=8, blend=([prefix], None), split="100,0,0", tokenizer=tokenizer,
        reset_position_ids=False, reset_attention_mask=False, eod_mask_loss=False,
    )  # fmt: skip
    dataset = BlendedMegatronDatasetBuilder(GPTDataset, [samples, 0, 0], lambda: True, config).build()[0]
    return [int(dataset[k]["tokens"][0]) for k in range(samples)]


def how_often(documents):
    return Counter(Counter(documents).values())


def words(counts):
    return "documents seen " + ", ".join(f"{times} times: {documents}" for times, documents in sorted(counts.items()))


part, one, two, three = (order(samples) for samples in (20, 39, 80, 120))
within, beyond = one[:20] == part, three[:80] == two
print("less than an epoch, then a whole one: the first 20 samples are", "the same" if within else "others")
print("two epochs, then three: the first 80 samples are", "the same" if beyond else "others")
at_once, resumed = how_often(three), how_often(two + three[80:])
print("three epochs in one run:", words(at_once))
print("two epochs, resumed for the third:", words(resumed))
sys.exit(0 if within and not beyond and max(at_once) == 4 and min(resumed) == 1 and max(resumed) == 5 else 1)
PY
"$work/venv/bin/python" -W ignore "$work/order.py" "$work" 2> "$work/errors" || { tail -3 "$work/errors"; exit 1; }
