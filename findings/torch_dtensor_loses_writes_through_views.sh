#!/usr/bin/env bash
# torch 2.13.0 on the CPU, one and two ranks over gloo: fully_shard (FSDP2), DTensor, nn.Embedding.
#
# Guess before trying: nn.Embedding sets its padding row to zero through a view, self.weight[padding_idx].fill_(0), and a row
#   of a tensor that is sharded by rows cannot be a view of the shard.
# Expected: a model that is made on the meta device, split by fully_shard, given memory by to_empty() and initialised by
#   reset_parameters(), as FSDP2 is meant to be used, starts as the same model in one process does: the row of padding_idx
#   is 0. In general y[0].zero_() sets the first row of y to 0, or is refused, as y[0] = 0 is for a DTensor.
# Seen: on one rank, yes. On two the padding row keeps the random numbers that it was drawn with, and as padding_idx keeps
#   gradients away from it, it keeps them for good; it is in every checkpoint. Sums and means over tokens, convolutions and
#   whatever else trusts that padding is 0 then depend on how much padding a text has.
#   The cause is wider: what is written in place through a view that cuts the dimension along which a tensor is sharded
#   goes to a copy and is lost; through views that cut another dimension it arrives. So initialising a part of a fused
#   weight (of query, key and value, of the experts) or copying rows into an embedding does nothing. Nothing warns.
#   PyTorch's issue 147570 tells of it for view().
# Output seen (sums: of a text's embeddings with five tokens of padding beside those without):
#   one process:          padding row  0.00  0.00  0.00  0.00, after 20 steps  0.00  0.00  0.00  0.00; sums apart by 0.00
#   fully_shard, 1 rank:  padding row  0.00  0.00  0.00  0.00, after 20 steps  0.00  0.00  0.00  0.00; sums apart by 0.00
#   fully_shard, 2 ranks: padding row  0.85  0.69 -0.32 -2.12, after 20 steps  0.85  0.69 -0.32 -2.12; sums apart by 10.58
#   a matrix on two ranks, sharded:
#   y[0].zero_()               by rows: lost     by columns: written
#   y[1:3].mul_(0)             by rows: lost     by columns: written
#   y[:2].copy_(3 * y[2:])     by rows: lost     by columns: written
#   y.data[0].zero_()          by rows: lost     by columns: written
#   nn.init.zeros_(y[0])       by rows: lost     by columns: written
#   y[:, 0].zero_()            by rows: written  by columns: lost
#   y.split(3, 1)[1].zero_()   by rows: written  by columns: lost
#   y.diagonal().zero_()       by rows: lost     by columns: lost
#   y[0] = y[3]                by rows: lost     by columns: written
#   y[0] = 0                   by rows: refused  by columns: refused
# Multiplying the whole tensor in place by a mask, or writing to to_local(), avoids it.
#
# Exits with 0 if that is so, with another status if it has changed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 numpy 2> "$work/errors" || { cat "$work/errors"; exit 1; }
cat > "$work/views.py" <<'PY'
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

PAD = 1
WRITES = {
    "y[0].zero_()": lambda y: y[0].zero_(),
    "y[1:3].mul_(0)": lambda y: y[1:3].mul_(0),
    "y[:2].copy_(3 * y[2:])": lambda y: y[:2].copy_(3 * y[2:]),
    "y.data[0].zero_()": lambda y: y.data[0].zero_(),
    "nn.init.zeros_(y[0])": lambda y: nn.init.zeros_(y[0]),
    "y[:, 0].zero_()": lambda y: y[:, 0].zero_(),
    "y.split(3, 1)[1].zero_()": lambda y: y.split(3, 1)[1].zero_(),
    "y.diagonal().zero_()": lambda y: y.diagonal().zero_(),
    "y[0] = y[3]": lambda y: y.__setitem__(0, y[3]),
    "y[0] = 0": lambda y: y.__setitem__(0, 0.0),
}
dist.init_process_group("gloo")
ranks = dist.get_world_size()
mesh = init_device_mesh("cpu", (ranks,))


def embedding(shard):
    """An embedding made on the meta device, then initialised; shared out over the ranks before that if asked for."""
    with torch.device("meta"):
        module = nn.Embedding(8, 4, padding_idx=PAD)
    if shard:
        fully_shard(module, mesh=mesh)
    module.to_empty(device="cpu")
    torch.manual_seed(0)
    module.reset_parameters()
    return module


def whole(tensor):
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def train(module):
    """The padding row before and after twenty steps of SGD on a text of three tokens and five of padding, and how far the
    sum of the text's embeddings is from that of the same text without padding then."""
    before = whole(module.weight)[PAD]
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    text = torch.tensor([[2, 3, 4, PAD, PAD, PAD, PAD, PAD]])
    for _ in range(20):
        module(text).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    apart = (module(text).sum(1) - module(text[:, :3]).sum(1)).abs().max().item()
    return before, whole(module.weight)[PAD], apart


def write(change, dim):
    """What a change in place does to a matrix that is sharded along `dim`: written, lost or refused."""
    start = torch.arange(1.0, 25.0).view(4, 6)
    wanted, sharded = start.clone(), distribute_tensor(start.clone(), mesh, [Shard(dim)])
    change(wanted)
    try:
        change(sharded)
    except (RuntimeError, NotImplementedError):
        return "refused"
    found = whole(sharded)
    return "written" if torch.equal(found, wanted) else "lost" if torch.equal(found, start) else "other"


def numbers(row):
    return " ".join(f"{number:5.2f}" for number in row.tolist())


lines, as_described = [], True
for shard in [False, True] if ranks == 1 else [True]:
    before, after, apart = train(embedding(shard))
    name = f"fully_shard, {ranks} rank{'s' * (ranks > 1)}:" if shard else "one process:"
    lines.append(f"{name:21} padding row {numbers(before)}, after 20 steps {numbers(after)}; sums apart by {apart:.2f}")
    as_described &= torch.equal(before, after)
    as_described &= bool(before.abs().min() > 0.01 and apart > 0.1) if ranks > 1 else not before.any() and apart < 1e-5
if ranks > 1:
    found = {name: (write(change, 0), write(change, 1)) for name, change in WRITES.items()}
    lines.append("a matrix on two ranks, sharded:")
    lines += [f"{name:26} by rows: {rows:8} by columns: {columns}" for name, (rows, columns) in found.items()]
    as_described &= list(found.values()) == [("lost", "written")] * 5 + [("written", "lost")] * 2 + [
        ("lost", "lost"),
        ("lost", "written"),
        ("refused", "refused"),
    ]
if dist.get_rank() == 0:
    print("\n".join(lines))
dist.destroy_process_group()
sys.exit(0 if as_described else 1)
PY
export OMP_NUM_THREADS=1
for ranks in 1 2; do
  "$work/venv/bin/torchrun" --standalone --nproc-per-node "$ranks" "$work/views.py" 2> "$work/errors" \
    || { tail -20 "$work/errors"; exit 1; }
done
