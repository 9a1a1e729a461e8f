#!/usr/bin/env bash
# megatron-core 0.16.1 (PyPI), torch 2.13.0 on the CPU.
#
# Guess before trying: the function that writes a checkpoint's files waits on a queue on which each of its processes must
#   report. Where the out-of-memory killer ends one of them, nobody reports for it.
# Expected: dist_checkpointing.save raises that a writer is gone.
# Seen: it waits for ever: the loop of a trainer stands still, and nothing says why.
# Output seen: 30 s after its writer was killed: save still waits
#
# Exits with 0 if the save still waits, with another status if that has changed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 megatron-core==0.16.1 numpy setuptools psutil
cat > "$work/save.py" <<'PY'
import os
import queue
import signal
import sys
import threading

import torch
import torch.distributed as dist

# megatron-core asks for the current CUDA device where there is none.
torch.cuda.current_device = lambda: torch.device("cpu")
torch.cuda.synchronize = lambda *args: None

if __name__ == "__main__":
    from megatron.core import dist_checkpointing, parallel_state
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    filesystem_async._results_queue = queue.Queue()  # no server process, which would outlive this one
    FileSystemWriterAsync = filesystem_async.FileSystemWriterAsync
    write = FileSystemWriterAsync.write_preloaded_data

    def killed(*args, local_proc_idx, **kwargs):
        if local_proc_idx == 0:
            os.kill(os.getpid(), signal.SIGKILL)  # as the kernel does where memory is short
        write(*args, local_proc_idx=local_proc_idx, **kwargs)

    FileSystemWriterAsync.write_preloaded_data = staticmethod(killed)
    dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}/rendezvous", rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    tensors = {
        name: dist_checkpointing.ShardedTensor.from_rank_offsets(name, torch.zeros(8)) for name in ("one", "two")
    }
    ended = []

    def save():
        try:
            dist_checkpointing.save(tensors, sys.argv[1] + "/checkpoint")
            ended.append("save returned")
        except BaseException as error:
            ended.append(f"save raised {type(error).__name__}")

    thread = threading.Thread(target=save, daemon=True)
    thread.start()
    thread.join(30)
    print("30 s after its writer was killed:", *(ended or ["save still waits"]), flush=True)
    os._exit(1 if ended else 0)
PY
mkdir "$work/checkpoint"
"$work/venv/bin/python" -W ignore "$work/save.py" "$work" 2> "$work/errors" || { tail -3 "$work/errors"; exit 1; }
