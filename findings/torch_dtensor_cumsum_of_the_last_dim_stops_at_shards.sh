#!/usr/bin/env bash
# torch 2.13.0 on the CPU, two ranks over gloo.
#
# Expected: cumsum(-1) of a matrix that is a DTensor gives what cumsum(1) gives, however it is sharded.
# Seen: along a sharded dimension cumsum, cumprod and logcumsumexp are right if it is counted from the front and wrong
#   if it is counted from the back: each rank starts anew, and the result still says that it is sharded as the input
#   was. Nothing warns; softmax, sort, cummax and others are right both ways. Positions from an attention mask,
#   documents from their boundaries, rewards to come and draws from cumulated probabilities are mostly written with
#   -1; they are wrong where the sequence (context or sequence parallel) or the vocabulary (tensor parallel) is split.
#   A draw can even give a token that does not exist.
# Output seen (eight ones in two shards; the token that u = 0.6 draws from eight equal probabilities):
#   one rank:   cumsum(1)  1 2 3 4 5 6 7 8; draws 4
#   two shards: cumsum(1)  1 2 3 4 5 6 7 8; draws 4
#   two shards: cumsum(-1) 1 2 3 4 1 2 3 4; draws 8
#   wrong with -1: cumsum cumprod logcumsumexp; right with -1: cummax softmax log_softmax argmax sort topk
# Dimensions counted from the front, or redistribute(placements=[Replicate()]) before it, avoid it.
#
# Exits with 0 if that is so, with another status if it has changed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 numpy 2> "$work/errors" || { cat "$work/errors"; exit 1; }
cat > "$work/scan.py" <<'PY'
import sys

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

SCANS = ("cumsum", "cumprod", "logcumsumexp")
OTHERS = ("cummax", "softmax", "log_softmax", "argmax", "sort", "topk")
dist.init_process_group("gloo")
mesh = init_device_mesh("cpu", (2,))


def split(tensor):
    """The same tensor, its last dimension shared out over the two ranks."""
    return distribute_tensor(tensor, mesh, [Shard(1)])


def call(name, tensor, dim):
    """The values of an operation along a dimension, gathered from the ranks if they are sharded."""
    result = tensor.topk(2, dim) if name == "topk" else getattr(tensor, name)(dim)
    values = result[0] if isinstance(result, tuple) else result
    return values if type(values) is torch.Tensor else values.full_tensor()


def draw(probabilities, dim):
    """The token that u = 0.6 draws: how many cumulated probabilities lie at or below it."""
    return int((call("cumsum", probabilities, dim) <= 0.6).sum())


ones, equal = torch.ones(1, 8), torch.full((1, 8), 1 / 8)
numbers = torch.rand(4, 8, generator=torch.Generator().manual_seed(0))
plain, front, back = call("cumsum", ones, 1), call("cumsum", split(ones), 1), call("cumsum", split(ones), -1)
draws = draw(equal, -1), draw(split(equal), 1), draw(split(equal), -1)
wrong, right = [], []
for name in SCANS + OTHERS:
    wanted = call(name, numbers, 1)
    assert torch.allclose(call(name, split(numbers), 1).float(), wanted.float(), atol=1e-5), name
    same = torch.allclose(call(name, split(numbers), -1).float(), wanted.float(), atol=1e-5)
    (right if same else wrong).append(name)
if dist.get_rank() == 0:
    rows = [" ".join(str(int(value)) for value in row[0]) for row in (plain, front, back)]
    print(f"one rank:   cumsum(1)  {rows[0]}; draws {draws[0]}")
    print(f"two shards: cumsum(1)  {rows[1]}; draws {draws[1]}")
    print(f"two shards: cumsum(-1) {rows[2]}; draws {draws[2]}")
    print(f"wrong with -1: {' '.join(wrong)}; right with -1: {' '.join(right)}")
dist.destroy_process_group()
as_described = (
    torch.equal(plain, front)
    and back.flatten().tolist() == [1, 2, 3, 4] * 2
    and draws == (4, 4, 8)
    and tuple(wrong) == SCANS
    and tuple(right) == OTHERS
)
sys.exit(0 if as_described else 1)
PY
export OMP_NUM_THREADS=1
"$work/venv/bin/torchrun" --standalone --nproc-per-node 2 "$work/scan.py" 2> "$work/errors" \
  || { tail -20 "$work/errors"; exit 1; }
