#!/usr/bin/env bash
# torch 2.13.0 on the CPU, two ranks over gloo.
#
# Expected: any() of a tensor that is sharded over the ranks is one truth value, so any().int() is 0 or 1, as it is for a
#   plain tensor. Training code turns "was a gradient infinite" into a number in this way, to add it up or multiply with it.
# Seen: any() is a DTensor of bool whose value is still to be summed over the ranks (Partial(sum)). Read as a bool it is
#   right. int(), float(), double() and a product with 1.0 keep the pending sum: where both shards hold a True the result
#   is 2, the number of ranks, and 1 - any().int() is -1. Adding 0, ~ and torch.where() reduce first and are right; so is
#   all().int(), whose pending reduction is a product. any().full_tensor().int() is right.
# Output seen: any() True; any().int() 2; any() * 1.0 2.0; 1 - any().int() -1; any() + 0 1; where(any(), 1, 0) 1;
#   all().int() 1; any().full_tensor().int() 1
#
# Exits with 0 if that is so, with another status if it has changed.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet torch==2.13.0 numpy

cat >"$dir/flags.py" <<'PY'
import sys

import torch
import torch.distributed as dist
from torch.distributed.tensor import DeviceMesh, Shard, distribute_tensor

dist.init_process_group("gloo")
mesh = DeviceMesh("cpu", list(range(dist.get_world_size())))
flags = distribute_tensor(torch.ones(4, dtype=torch.bool), mesh, [Shard(0)])
ways = {
    "any()": lambda: flags.any(),
    "any().int()": lambda: flags.any().int(),
    "any() * 1.0": lambda: flags.any() * 1.0,
    "1 - any().int()": lambda: 1 - flags.any().int(),
    "any() + 0": lambda: flags.any() + 0,
    "where(any(), 1, 0)": lambda: torch.where(flags.any(), 1, 0),
    "all().int()": lambda: flags.all().int(),
    "any().full_tensor().int()": lambda: flags.any().full_tensor().int(),
}
found = {}
for name, way in ways.items():
    value = way()
    found[name] = value.full_tensor().item() if hasattr(value, "full_tensor") else value.item()
if dist.get_rank() == 0:
    print("; ".join(f"{name} {value}" for name, value in found.items()))
wanted = {
    "any()": True,
    "any().int()": 2,
    "any() * 1.0": 2.0,
    "1 - any().int()": -1,
    "any() + 0": 1,
    "where(any(), 1, 0)": 1,
    "all().int()": 1,
    "any().full_tensor().int()": 1,
}
dist.barrier()
dist.destroy_process_group()
sys.exit(0 if found == wanted else "torch behaves otherwise now")
PY
OMP_NUM_THREADS=1 "$dir/venv/bin/torchrun" --standalone --nproc-per-node 2 "$dir/flags.py"
