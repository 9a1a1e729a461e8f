#!/usr/bin/env bash
# torch 2.13.0 on the CPU, two ranks over gloo.
#
# Expected: parallelize_module keeps a weight that two modules share (tied embeddings) one weight, above all where both
#   plans split it the same way: RowwiseParallel of an embedding and ColwiseParallel of the output layer both put
#   Shard(0) on it. Or it refuses, as fully_shard does.
# Seen: each module named in the plan gets a parameter of its own, a plan for one of the two already parts them.
#   They start equal, then each has its part of the gradient and an optimizer state of its own: another, larger
#   model is trained, by a loss that looks better, and an export that ties them again loses one of the two.
#   distribute_module without any rule makes two parameters of one memory, which the optimizer moves twice in each
#   step, once for each part of the gradient. Nothing warns. fully_shard of each of the two ends with an error at
#   the first forward pass; of the whole model it keeps them one. (torchtitan's issue 2252 is about tying that is
#   lost on the meta device, not this.)
# Output seen (parameters, loss of the first and of the 50th step, largest difference of the two weights at the end):
#   one rank:               3 parameters, loss 4.970 to 2.618, apart by 0.000
#   plan for neither:       3 parameters, loss 4.970 to 2.618, apart by 0.000
#   plan for both:          4 parameters, loss 4.970 to 2.091, apart by 1.091
#   plan for the embedding: 4 parameters, loss 4.970 to 2.091, apart by 1.091
#   both, tied again:       3 parameters, loss 4.970 to 2.618, apart by 0.000
#   distribute_module:      4 parameters, loss 4.970 to 2.260, apart by 0.000
#   fully_shard, each:      ValueError
#   fully_shard, whole:     3 parameters, loss 4.970 to 2.618, apart by 0.000
# model.head.weight = model.embedding.weight after parallelize_module, before the optimizer is made, avoids it.
#
# Exits with 0 if that is so, with another status if it has changed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 numpy 2> "$work/errors" || { cat "$work/errors"; exit 1; }
cat > "$work/tied.py" <<'PY'
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

dist.init_process_group("gloo")
mesh = init_device_mesh("cpu", (2,))
ids = torch.randint(64, (4, 16), generator=torch.Generator().manual_seed(0))
labels = ids.roll(-1, 1).flatten()


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.middle = nn.Embedding(64, 8), nn.Linear(8, 8)
        self.head = nn.Linear(8, 64, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids):
        return self.head(torch.tanh(self.middle(self.embedding(ids))))


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def train(change):
    """Number of parameters, first and last loss, largest difference between the two weights."""
    torch.manual_seed(0)
    model = Model()
    change(model)
    rows = distribute_tensor(ids, mesh, [Replicate()]) if change is without_rules else ids
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    losses = []
    for _ in range(50):
        loss = nn.functional.cross_entropy(whole(model(rows)).flatten(0, 1), labels)
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    apart = (whole(model.embedding.weight) - whole(model.head.weight)).abs().max().item()
    return len(list(model.parameters())), losses[0], losses[-1], apart


def plan(*names):
    rules = {
        "embedding": RowwiseParallel(input_layouts=Replicate()),
        "head": ColwiseParallel(output_layouts=Replicate()),
        "middle": ColwiseParallel(output_layouts=Replicate()),
    }
    return {name: rules[name] for name in names}


def both(model):
    parallelize_module(model, mesh, plan("embedding", "head"))
    assert model.embedding.weight.placements == model.head.weight.placements == (Shard(0),)


def tied_again(model):
    both(model)
    model.head.weight = model.embedding.weight


def without_rules(model):
    distribute_module(model, mesh)


def each(model):
    fully_shard(model.embedding, mesh=mesh)
    fully_shard(model.head, mesh=mesh)
    fully_shard(model, mesh=mesh)


ways = {
    "one rank": (lambda model: None, "tied"),
    "plan for neither": (lambda model: parallelize_module(model, mesh, plan("middle")), "tied"),
    "plan for both": (both, "apart"),
    "plan for the embedding": (lambda model: parallelize_module(model, mesh, plan("embedding")), "apart"),
    "both, tied again": (tied_again, "tied"),
    "distribute_module": (without_rules, "twice"),
    "fully_shard, each": (each, "refused"),
    "fully_shard, whole": (lambda model: fully_shard(model, mesh=mesh), "tied"),
}
as_described = True
for name, (change, expected) in ways.items():
    try:
        count, first, last, apart = train(change)
        line = f"{count} parameters, loss {first:.3f} to {last:.3f}, apart by {apart:.3f}"
        seen = {(3, False): "tied", (4, True): "apart", (4, False): "twice"}.get((count, apart > 0.5), "other")
    except ValueError:
        line = "ValueError"
        seen = "refused"
    if dist.get_rank() == 0:
        print(f"{name + ':':23} {line}", flush=True)
    as_described &= seen == expected
dist.barrier()
dist.destroy_process_group()
sys.exit(0 if as_described else 1)
PY
export OMP_NUM_THREADS=1
"$work/venv/bin/torchrun" --standalone --nproc-per-node 2 "$work/tied.py" 2> "$work/log" \
  || { tail -20 "$work/log"; exit 1; }
