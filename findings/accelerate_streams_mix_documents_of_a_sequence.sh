#!/usr/bin/env bash
# accelerate 1.15.0 (PyPI), torch 2.13.0 on the CPU (four ranks over gloo); transformers 5.24.0 is there only because
# ParallelismConfig looks up its version where tp_size is above 1.
#
# Guess before trying: batches of a stream are read by rank 0 and handed out, and what hands them out asks the mesh for
#   dimensions that ParallelismConfig calls otherwise.
# Expected: ranks that share a sequence (context parallel, cp_size) or a layer (tensor parallel, tp_size) get the same
#   rows, and groups of data parallel ranks get different ones, whatever kind of data set the loader reads. So it is with
#   a data set that has a length, and with a stream and dispatch_batches=False.
# Seen: with a stream (IterableDataset) and nothing else said, each rank of one sequence gets rows of its own. Context
#   parallel then cuts them as if they were one: a model reads the beginning and the end of one document around the middle
#   of another, at the right positions, and half of all tokens are read by nobody.
#   Together with tensor parallelism it is the other way round: all data parallel groups get the same rows, so that a step
#   of two groups has the documents of one and the second group adds nothing. Shapes are right and nothing warns.
# Read in the source, not run: Accelerator.prepare calls the prepare_data_loader used here, with the mesh that
#   ParallelismConfig makes.
# Output seen (eight documents a to h of eight tokens, one document to a batch; what each data parallel group reads in its
# first step, in the order of positions; how many steps the epoch has and how many of the tokens nobody reads in it):
#   dp_shard 2, cp 2: data set               a0 a1 a2 a3 a4 a5 a6 a7 | b0 b1 b2 b3 b4 b5 b6 b7  steps 4  never  0 %
#   dp_shard 2, cp 2: stream                 a0 a1 b2 b3 b4 b5 a6 a7 | c0 c1 d2 d3 d4 d5 c6 c7  steps 2  never 50 %
#   dp_shard 2, cp 2: stream, not dispatched a0 a1 a2 a3 a4 a5 a6 a7 | b0 b1 b2 b3 b4 b5 b6 b7  steps 4  never  0 %
#   dp_shard 2, tp 2: data set               a0 a1 a2 a3 a4 a5 a6 a7 | b0 b1 b2 b3 b4 b5 b6 b7  steps 4  never  0 %
#   dp_shard 2, tp 2: stream                 a0 a1 a2 a3 a4 a5 a6 a7 | a0 a1 a2 a3 a4 a5 a6 a7  steps 8  never  0 %
#   dp_shard 2, tp 2: stream, not dispatched a0 a1 a2 a3 a4 a5 a6 a7 | b0 b1 b2 b3 b4 b5 b6 b7  steps 4  never  0 %
# dispatch_batches=False avoids it where every rank reads the same stream in the same order; huggingface/accelerate pull
# request 3626 asks for it with context parallelism.
#
# Exits with 0 if that is so, with another status if it has changed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --no-compile torch==2.13.0 accelerate==1.15.0 transformers==5.24.0 numpy \
  2> "$work/errors" || { cat "$work/errors"; exit 1; }
cat > "$work/streams.py" <<'PY'
import os
import socket

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from accelerate import PartialState
from accelerate.data_loader import prepare_data_loader
from accelerate.parallelism_config import ParallelismConfig
from torch.distributed.tensor.experimental import context_parallel
from torch.utils.data import DataLoader, IterableDataset

LENGTH = 8
DOCUMENTS = torch.arange(8 * LENGTH).view(8, LENGTH)  # token t of document d is the number 8 d + t


class Stream(IterableDataset):
    def __iter__(self):
        yield from DOCUMENTS


def read(mesh, data, dispatch_batches):
    """Of this rank: for each step the tokens that it reads, by their positions; a rank of a sequence reads its part."""
    loader = prepare_data_loader(
        DataLoader(data, batch_size=1),
        device=torch.device("cpu"),
        put_on_device=True,
        dispatch_batches=dispatch_batches,
        torch_device_mesh=mesh,
    )
    steps = []
    for batch in loader:
        batch, positions = batch.clone(), torch.arange(LENGTH)[None]
        if "cp" in mesh.mesh_dim_names:
            buffers = [batch, positions]
            with context_parallel(mesh["cp"], buffers=buffers, buffer_seq_dims=[1, 1], no_restore_buffers=set(buffers)):
                pass
        steps.append(dict(zip(positions[0].tolist(), batch[0].tolist(), strict=True)))
    return steps


def name(token):
    return "abcdefgh"[token // LENGTH] + str(token % LENGTH)


def compare(rank, port):
    """Print what each group reads with every mesh and kind of loader; raise if it is not as described above."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="4", MASTER_ADDR="localhost", MASTER_PORT=port)
    PartialState(cpu=True)
    found = []
    for other in ("cp", "tp"):
        mesh = ParallelismConfig(**{"dp_shard_size": 2, f"{other}_size": 2}).get_device_mesh("cpu")
        for kind, data, dispatch in [
            ("data set", DOCUMENTS, None),
            ("stream", Stream(), None),
            ("stream, not dispatched", Stream(), False),
        ]:
            ranks = [None] * 4
            dist.all_gather_object(ranks, read(mesh, data, dispatch))
            first = []
            for group in (ranks[:2], ranks[2:]):
                together = group[0][0] | group[1][0]
                first.append(" ".join(name(together[position]) for position in range(LENGTH)))
            steps, seen = len(ranks[0]), {token for rank in ranks for step in rank for token in step.values()}
            never = 100 - 100 * len(seen) // DOCUMENTS.numel()
            found.append((*first, steps, never))
            if rank == 0:
                read_first = " | ".join(first)
                print(f"dp_shard 2, {other} 2: {kind:22} {read_first}  steps {steps}  never {never:2} %", flush=True)
    dist.destroy_process_group()
    a, b = (" ".join(f"{letter}{token}" for token in range(LENGTH)) for letter in "ab")
    right, mixed = (a, b, 4, 0), ("a0 a1 b2 b3 b4 b5 a6 a7", "c0 c1 d2 d3 d4 d5 c6 c7", 2, 50)
    if found != [right, mixed, right, right, (a, a, 8, 0), right]:
        raise SystemExit("this has changed")


with socket.socket() as free:
    free.bind(("localhost", 0))
    port = str(free.getsockname()[1])
mp.start_processes(compare, (port,), nprocs=4, start_method="fork")
PY
export OMP_NUM_THREADS=1
"$work/venv/bin/python" -W ignore "$work/streams.py" 2> "$work/errors" \
  || { tail -20 "$work/errors"; exit 1; }
