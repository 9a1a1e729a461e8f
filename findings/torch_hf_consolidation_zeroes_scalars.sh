#!/usr/bin/env bash
# torch 2.13.0 on the CPU (one process), safetensors 0.8.0 (PyPI).
#
# Expected: dcp.save with HuggingFaceStorageWriter(save_distributed=True, enable_consolidation=True) leaves files in the
#   layout of Hugging Face that hold every tensor as it was saved.
# Seen: tensors without dimensions come out as 0: the scale of an FP8 weight or of a KV cache, a logit scale, the alpha
#   of an adapter. Names, shapes and dtypes are there, only the number is lost, and nothing warns. A tensor of shape
#   (1,) comes out right, and the shards that were consolidated still hold the scalar.
#   consolidate_safetensors_files, called on such shards by itself, does the same.
# Output seen:
#   saved:         scale () 3.5, bias () bfloat16 -2.0, one (1,) 3.5, weight (2, 3) 7.5
#   shards:        scale () 3.5, bias () bfloat16 -2.0, one (1,) 3.5, weight (2, 3) 7.5
#   consolidated:  scale () 0.0, bias () bfloat16 0.0, one (1,) 3.5, weight (2, 3) 7.5
# Saving tensor.reshape(1), or without save_distributed, avoids it.
#
# Exits with 0 if that is so, with another status if it has changed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 safetensors==0.8.0 numpy \
  2> "$work/errors" || { cat "$work/errors"; exit 1; }
cat > "$work/scalars.py" <<'PY'
import logging
import sys
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch.distributed.checkpoint import HuggingFaceStorageWriter
from torch.distributed.checkpoint._consolidate_hf_safetensors import consolidate_safetensors_files

logging.disable(logging.WARNING)
STATE = {
    "scale": torch.tensor(3.5),
    "bias": torch.tensor(-2.0, dtype=torch.bfloat16),
    "one": torch.tensor([3.5]),
    "weight": torch.full((2, 3), 7.5),
}


def read(folder):
    found = {}
    for path in sorted(Path(folder).glob("*.safetensors")):
        found |= load_file(path)
    return {name: found[name] for name in STATE}


def text(tensors):
    described = []
    for name, tensor in tensors.items():
        kind = "bfloat16 " if tensor.dtype == torch.bfloat16 else ""
        described.append(f"{name} {tuple(tensor.shape)} {kind}{tensor.flatten()[0].item()}")
    return ", ".join(described)


def right(tensors):
    """The names of the tensors that are as they were saved; shapes and dtypes have to be."""
    for name, tensor in tensors.items():
        assert (tensor.shape, tensor.dtype) == (STATE[name].shape, STATE[name].dtype), name
    return {name for name, tensor in tensors.items() if torch.equal(tensor, STATE[name])}


def save(folder, **options):
    writer = HuggingFaceStorageWriter(folder, fqn_to_index_mapping=dict.fromkeys(STATE, 1), **options)
    dcp.save(dict(STATE), storage_writer=writer, no_dist=True)


folder, again, whole = (f"{sys.argv[1]}/{name}" for name in ("saved", "again", "whole"))
save(folder, save_distributed=True, enable_consolidation=True)
shards, consolidated = read(f"{folder}/sharded"), read(folder)
Path(again).mkdir()
consolidate_safetensors_files(f"{folder}/sharded", again, fqn_to_index_mapping=dict.fromkeys(STATE, 1))
save(whole, save_distributed=False)
print("saved:        ", text(STATE))
print("shards:       ", text(shards))
print("consolidated: ", text(consolidated))
wanted = {"one", "weight"}
as_described = (
    right(shards) == set(STATE)
    and right(consolidated) == right(read(again)) == wanted
    and right(read(whole)) == set(STATE)
    and consolidated["scale"] == 0
)
sys.exit(0 if as_described else 1)
PY
"$work/venv/bin/python" -W ignore "$work/scalars.py" "$work" 2> "$work/errors" || { tail -5 "$work/errors"; exit 1; }
