"""A trainer in a process of its own that makes its group as trainers do for SGLang: by torch's helper of groups, under
a name, over a store. It sends the weights of a folder.

Arguments: URL of the server, port of the store, engine's ranks, Hugging Face's folder, tensors a request, backend. With
nccl it takes the GPU after the engine's.
"""

from __future__ import annotations

import sys
import threading
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx2
import torch
from safetensors.torch import load_file
from torch import distributed
from torch.distributed import distributed_c10d as c10d

NAME = "slime-pp_0"
LIMIT = timedelta(seconds=200)


def make_group(port: int, size: int, backend: str) -> Any:
    """Rank 0 of the group."""
    store, rank, _ = next(distributed.rendezvous(f"tcp://127.0.0.1:{port}", 0, size, timeout=LIMIT))
    store.set_timeout(LIMIT)
    options = {"backend": c10d.Backend(backend), "group_name": c10d.GroupName(NAME), "timeout": LIMIT}
    group, _ = c10d._new_process_group_helper(size, rank, [], store=distributed.PrefixStore(NAME, store), **options)
    c10d._world.pg_group_ranks[group] = {own: own for own in range(size)}
    return group


def main(url: str, port: str, ranks: str, folder: str, at_once: str, backend: str) -> None:
    size, step = 1 + int(ranks), int(at_once)
    device = torch.device("cuda", int(ranks)) if backend == "nccl" else torch.device("cpu")

    def post(path: str, fields: dict[str, Any]) -> None:
        response = httpx2.post(url + path, json=fields, timeout=200)
        print(response.text)
        assert response.json()["success"], response.text

    def beside(path: str, fields: dict[str, Any]) -> threading.Thread:
        thread = threading.Thread(target=post, args=(path, fields))
        thread.start()
        return thread

    place = {"master_address": "127.0.0.1", "master_port": int(port), "rank_offset": 1, "world_size": size}
    joining = beside("/init_weights_update_group", place | {"group_name": NAME, "backend": backend})
    group = make_group(int(port), size, backend)
    joining.join()
    weights = [(name, t.to(device)) for name, t in load_file(Path(folder) / "model.safetensors").items()]
    for start in range(0, len(weights), step):
        part = weights[start : start + step]
        fields = {
            "names": [name for name, _ in part],
            "dtypes": [str(tensor.dtype).replace("torch.", "") for _, tensor in part],
            "shapes": [list(tensor.shape) for _, tensor in part],
            "group_name": NAME,
            "flush_cache": False,
            "weight_version": "7",
        }
        receiving = beside("/update_weights_from_distributed", fields)
        for work in [distributed.broadcast(tensor, 0, group=group, async_op=True) for _, tensor in part]:
            work.wait()
        receiving.join()
    post("/destroy_weights_update_group", {"group_name": NAME})


if __name__ == "__main__":
    main(*sys.argv[1:])
