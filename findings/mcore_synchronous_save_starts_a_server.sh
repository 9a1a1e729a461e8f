#!/usr/bin/env bash
# megatron-core 0.16.1 (PyPI), torch 2.13.0 on the CPU.
#
# Expected: dist_checkpointing.save without async_sharded_save writes in this process or in short-lived writers; when it
#   returns, the processes are those of before.
# Seen: the first save starts a multiprocessing.Manager by spawn, a server process that imports the main script anew and
#   stays as long as the trainer runs. A trainer that is killed, by the out-of-memory killer say, cannot stop it.
# Output seen: alive after the synchronous save: ['SpawnProcess SyncManager-1']
# Setting FileSystemWriterAsync's module-level _results_queue to a queue.Queue() before the first save avoids it.
#
# Exits with 0 if a server process is there after the save, with another status if that has changed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 megatron-core==0.16.1 numpy setuptools psutil
cat > "$work/save.py" <<'PY'
import multiprocessing
import sys

import torch
import torch.distributed as dist

# megatron-core asks for the current CUDA device where there is none.
torch.cuda.current_device = lambda: torch.device("cpu")
torch.cuda.synchronize = lambda *args: None

if __name__ == "__main__":
    from megatron.core import dist_checkpointing, parallel_state

    dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}/rendezvous", rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    tensor = dist_checkpointing.ShardedTensor.from_rank_offsets("weight", torch.zeros(8))
    before = {child.pid for child in multiprocessing.active_children()}
    dist_checkpointing.save({"weight": tensor}, sys.argv[1] + "/checkpoint")
    left = [child for child in multiprocessing.active_children() if child.pid not in before]
    print("alive after the synchronous save:", [f"{type(c).__name__} {c.name}" for c in left], flush=True)
    sys.exit(0 if any("SyncManager" in child.name for child in left) else 1)
PY
mkdir "$work/checkpoint"
"$work/venv/bin/python" -W ignore "$work/save.py" "$work" 2> "$work/errors" || { tail -3 "$work/errors"; exit 1; }
