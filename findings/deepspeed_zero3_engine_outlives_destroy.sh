#!/usr/bin/env bash
# deepspeed 0.19.8 (PyPI), torch 2.13.0 on the CPU (gloo, one rank, ZeRO stages 1, 2 and 3).
#
# Expected: when nothing of the caller refers to a DeepSpeed engine any more and engine.destroy() has run, engine, model,
#   gradients and optimizer state are freed, so that another engine can be made in the same process.
# Seen: so it is with ZeRO stages 1 and 2. With stage 3 engine and model are still alive after destroy(), del and
#   gc.collect(), and with them 10 MB of tensors for a model of 2 MB in float32. Engines made one after the other add up:
#   peak memory measured for a later one counts those before it.
# Output seen:
#   stage 1: engine gone, model gone, 0 MB of tensors left
#   stage 2: engine gone, model gone, 0 MB of tensors left
#   stage 3: engine alive, model alive, 10 MB of tensors left
#
# Exits with 0 if the engine of stage 3 alone outlives destroy(), with another status if that has changed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet deepspeed==0.19.8 torch==2.13.0 numpy setuptools \
  2> "$work/errors" || { cat "$work/errors"; exit 1; }
cat > "$work/engine.py" <<'PY'
import gc
import os
import sys
import weakref

import torch

os.environ.update(MASTER_ADDR="127.0.0.1", RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
torch.distributed.init_process_group("gloo", init_method=f"file://{sys.argv[1]}/rendezvous", rank=0, world_size=1)
import deepspeed  # noqa: E402


def live_bytes():
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in gc.get_objects() if torch.is_tensor(x)}
    return sum(storages.values())


outlived = []
for stage in (1, 2, 3):
    gc.collect()
    before = live_bytes()
    model = torch.nn.Sequential(torch.nn.Linear(512, 512, bias=False), torch.nn.Linear(512, 512, bias=False))
    settings = {
        "train_batch_size": 1,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
        "zero_optimization": {"stage": stage},
    }
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=settings)
    loss = engine(torch.randn(1, 512)).sum()
    engine.backward(loss)
    engine.step()
    refs = {"engine": weakref.ref(engine), "model": weakref.ref(model)}
    engine.destroy()
    del engine, model, loss, _
    gc.collect()
    words = ", ".join(f"{name} {'gone' if ref() is None else 'alive'}" for name, ref in refs.items())
    print(f"stage {stage}: {words}, {(live_bytes() - before) / 1e6:.0f} MB of tensors left", flush=True)
    outlived += [stage] if refs["engine"]() is not None else []
torch.distributed.destroy_process_group()
sys.exit(0 if outlived == [3] else 1)
PY
"$work/venv/bin/python" -W ignore "$work/engine.py" "$work" 2> "$work/errors" | grep '^stage' || { tail -5 "$work/errors"; exit 1; }
