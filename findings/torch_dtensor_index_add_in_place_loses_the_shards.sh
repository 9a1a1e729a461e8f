#!/usr/bin/env bash
# torch 2.13.0 on the CPU, two ranks over gloo: DTensor, fully_shard (FSDP2).
#
# Guess before trying: the indices of index_add_ count the rows of the whole tensor, and a rank has only some of them; in
#   place the result has to stay where it is.
# Expected: x.index_add_(0, indices, rows) with x sharded by rows gives what it gives for a plain tensor, or is refused, as
#   index_put_, index_fill_ and scatter_ are along a sharded dimension.
# Seen: index_add_, index_copy_ and scatter_add_ do nothing there, and worse: from then on x says that every rank holds all
#   of it (Replicate), while each has its shard still. full_tensor() is one rank's shard, so half of the rows are gone; a
#   sum is that of a shard, on each rank another. Nothing warns. Along other dimensions, and out of place, they are right.
#   What a layer of experts adds up in this way, zeros_like(x).index_add_(0, tokens, parts), is as many zeros as one
#   rank has rows; new rows copied into an embedding that FSDP2 splits leave it with the rows of one rank.
# Output seen (a matrix of four rows and two columns; "shard only": unchanged and one rank's shard for the whole):
#   index_add_    sharded by rows: shard only  by columns: right
#   index_copy_   sharded by rows: shard only  by columns: right
#   scatter_add_  sharded by rows: shard only  by columns: right
#   index_put_    sharded by rows: refused     by columns: right
#   index_fill_   sharded by rows: refused     by columns: right
#   scatter_      sharded by rows: refused     by columns: right
#   index_add     sharded by rows: right       by columns: right
#   placement of x before and after index_add_: (Shard(dim=0),) (Replicate(),), sum on the ranks: 3.0 7.0 instead of 18.0
#   zeros_like(x).index_add_(0, rows, 2.0): full_tensor() has 2 rows, their sum is 0.0
#   FSDP2: an embedding of 8 rows after index_copy_ of two new ones: full_tensor() has 4 rows, new ones among them: no
# The forms out of place, or writing to to_local() with indices of one's own, avoid it.
#
# Exits with 0 if that is so, with another status if it has changed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --no-compile torch==2.13.0 numpy 2> "$work/errors" || { cat "$work/errors"; exit 1; }
cat > "$work/index.py" <<'PY'
import os
import socket

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

ROWS, ADDED = torch.tensor([0, 3]), torch.full((2, 2), 2.0)
EACH = ROWS[:, None].expand(2, 2).contiguous()
CHANGES = {
    "index_add_": lambda x, on: x.index_add_(0, on(ROWS), on(ADDED)),
    "index_copy_": lambda x, on: x.index_copy_(0, on(ROWS), on(ADDED)),
    "scatter_add_": lambda x, on: x.scatter_add_(0, on(EACH), on(ADDED)),
    "index_put_": lambda x, on: x.index_put_((on(ROWS),), on(ADDED), accumulate=True),
    "index_fill_": lambda x, on: x.index_fill_(0, on(ROWS), 2.0),
    "scatter_": lambda x, on: x.scatter_(0, on(EACH), on(ADDED)),
    "index_add": lambda x, on: x.index_add(0, on(ROWS), on(ADDED)),
}


def start():
    return torch.tensor([[1.0, 0.0], [1.0, 1.0], [2.0, 1.0], [2.0, 2.0]])


def outcome(change, mesh, dim):
    """What a change of a matrix sharded along `dim` gives: right, refused, the shard alone as it was, or other."""
    sharded = distribute_tensor(start(), mesh, [Shard(dim)])
    shard = sharded.to_local().clone()
    try:
        changed = change(sharded, lambda tensor: distribute_tensor(tensor, mesh, [Replicate()])).full_tensor()
    except RuntimeError:
        return "refused"
    if torch.equal(changed, change(start(), lambda tensor: tensor)):
        return "right"
    return "shard only" if torch.equal(changed, shard) else "other"


def compare(rank, port):
    """Print what becomes of matrices and of an embedding; raise if it is not as described above."""
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="localhost", MASTER_PORT=port)
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,))
    found = {name: (outcome(change, mesh, 0), outcome(change, mesh, 1)) for name, change in CHANGES.items()}
    lines = [f"{name:13} sharded by rows: {rows:11} by columns: {columns}" for name, (rows, columns) in found.items()]

    x = distribute_tensor(start(), mesh, [Shard(0)])
    before = x.placements
    CHANGES["index_add_"](x, lambda tensor: distribute_tensor(tensor, mesh, [Replicate()]))
    sums = [None, None]
    dist.all_gather_object(sums, x.sum().full_tensor().item())
    wanted = CHANGES["index_add_"](start(), lambda tensor: tensor).sum().item()
    lines.append(
        f"placement of x before and after index_add_: {before} {x.placements}, sum on the ranks: "
        f"{sums[0]} {sums[1]} instead of {wanted}"
    )

    zeros = torch.zeros_like(distribute_tensor(start(), mesh, [Shard(0)]))
    added = CHANGES["index_add_"](zeros, lambda tensor: distribute_tensor(tensor, mesh, [Replicate()])).full_tensor()
    lines.append(
        f"zeros_like(x).index_add_(0, rows, 2.0): full_tensor() has {len(added)} rows, their sum is {added.sum().item()}"
    )

    embedding = nn.Embedding(8, 2)
    fully_shard(embedding, mesh=mesh)
    new, ids = torch.full((2, 2), 9.0), torch.tensor([1, 6])
    with torch.no_grad():
        embedding.weight.index_copy_(0, *(distribute_tensor(tensor, mesh, [Replicate()]) for tensor in (ids, new)))
    whole = embedding.weight.full_tensor()
    there = bool((whole == 9.0).any())
    lines.append(
        f"FSDP2: an embedding of {embedding.num_embeddings} rows after index_copy_ of two new ones: full_tensor() has "
        f"{len(whole)} rows, new ones among them: {'yes' if there else 'no'}"
    )
    if rank == 0:
        print("\n".join(lines), flush=True)
    dist.destroy_process_group()
    described = [("shard only", "right")] * 3 + [("refused", "right")] * 3 + [("right", "right")]
    as_described = list(found.values()) == described and (before, x.placements) == ((Shard(0),), (Replicate(),))
    as_described &= (sums, wanted, len(added), added.any().item()) == ([3.0, 7.0], 18.0, 2, False)
    if not as_described or len(whole) != 4 or there:
        raise SystemExit("this has changed")


with socket.socket() as free:
    free.bind(("localhost", 0))
    port = str(free.getsockname()[1])
mp.start_processes(compare, (port,), nprocs=2, start_method="fork")
PY
export OMP_NUM_THREADS=1
"$work/venv/bin/python" -W ignore "$work/index.py" 2> "$work/errors" || { tail -20 "$work/errors"; exit 1; }
