#!/usr/bin/env bash
# deepspeed 0.19.8 (PyPI), torch 2.13.0 on the CPU (gloo, one rank, ZeRO stages 1, 2 and 3).
#
# Expected: an engine that loads a universal checkpoint goes on with the learning rate and the weight decay that each
#   group of parameters had, so that norms and biases stay without decay.
# Seen: so it is with stages 1 and 2. With stage 3 every group takes the settings of the checkpoint's first one: norms
#   decay and learn at the rate of the matrices from then on, whatever the caller gave the optimizer. Nothing warns.
#   A scheduler with a base rate for each group sets the rates right again after one step; the decay stays wrong.
# Output seen (rate and decay of both groups, and to what weights of 1 come in a step whose gradients are all 0):
#   stage 1: checkpoint: 0.5 0.2, 0.1 0: 0.9 1; universal: 0.5 0.2, 0.1 0: 0.9 1
#   stage 2: checkpoint: 0.5 0.2, 0.1 0: 0.9 1; universal: 0.5 0.2, 0.1 0: 0.9 1
#   stage 3: checkpoint: 0.5 0.2, 0.1 0: 0.9 1; universal: 0.5 0.2, 0.5 0.2: 0.9 0.9
# Setting "lr" and "weight_decay" of engine.optimizer.param_groups again after loading avoids it.
#
# Exits with 0 if stage 3 alone does so, with another status if that has changed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet deepspeed==0.19.8 torch==2.13.0 numpy setuptools \
  2> "$work/errors" || { cat "$work/errors"; exit 1; }
cat > "$work/groups.py" <<'PY'
import os
import subprocess
import sys

import torch

os.environ.update(MASTER_ADDR="127.0.0.1", RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", DS_ACCELERATOR="cpu")
torch.distributed.init_process_group("gloo", init_method=f"file://{sys.argv[1]}/rendezvous", rank=0, world_size=1)
import deepspeed  # noqa: E402


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.matrix = torch.nn.Linear(4, 4, bias=False)
        self.norm = torch.nn.LayerNorm(4, bias=False)
        torch.nn.init.ones_(self.matrix.weight)

    def forward(self, x):
        return self.norm(self.matrix(x))


def make_engine(stage, universal=False):
    model = Model()
    groups = [
        {"params": [model.matrix.weight], "lr": 0.5, "weight_decay": 0.2},
        {"params": [model.norm.weight], "lr": 0.1, "weight_decay": 0.0},
    ]
    settings = {
        "train_batch_size": 1,
        "zero_optimization": {"stage": stage},
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
        "checkpoint": {"load_universal": universal},
    }
    return deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(groups), config=settings)[0]


def step_without_gradients(engine):
    engine.backward(0 * engine(torch.ones(1, 4)).sum())
    engine.step()


def weights(engine, stage):
    found = [engine.module.matrix.weight, engine.module.norm.weight]
    with deepspeed.zero.GatheredParameters(found, enabled=stage == 3):
        return [weight.detach().clone() for weight in found]


def save(stage, folder):
    engine = make_engine(stage)
    step_without_gradients(engine)
    engine.save_checkpoint(folder, tag="step1")
    options = [] if stage == 3 else ["--inject_missing_state"]
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--input_folder", f"{folder}/step1"]
    command += ["--output_folder", f"{folder}/universal", *options]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def loaded(stage, folder, tag):
    """Rate and decay of both groups, and by which factor a step without gradients shrinks their weights."""
    engine = make_engine(stage, universal=tag == "universal")
    path, _ = engine.load_checkpoint(folder, tag=tag)
    assert path is not None, "it says that it failed"
    settings = [(group["lr"], group["weight_decay"]) for group in engine.optimizer.param_groups]
    before = weights(engine, stage)
    step_without_gradients(engine)
    shrunk = [round((new / old).mean().item(), 3) for old, new in zip(before, weights(engine, stage), strict=True)]
    return settings, shrunk


def text(settings, shrunk):
    groups = ", ".join(f"{lr:g} {decay:g}" for lr, decay in settings)
    return f"{groups}: {' '.join(f'{factor:g}' for factor in shrunk)}"


if __name__ == "__main__":
    right, first_alone = ([(0.5, 0.2), (0.1, 0.0)], [0.9, 1.0]), ([(0.5, 0.2), (0.5, 0.2)], [0.9, 0.9])
    as_described = True
    for stage in (1, 2, 3):
        folder = f"{sys.argv[1]}/stage{stage}"
        save(stage, folder)
        plain, universal = loaded(stage, folder, "step1"), loaded(stage, folder, "universal")
        print(f"stage {stage}: checkpoint: {text(*plain)}; universal: {text(*universal)}", flush=True)
        as_described &= plain == right and universal == (first_alone if stage == 3 else right)
    torch.distributed.destroy_process_group()
    sys.exit(0 if as_described else 1)
PY
"$work/venv/bin/python" -W ignore "$work/groups.py" "$work" 2> "$work/errors" | grep '^stage' || { tail -5 "$work/errors"; exit 1; }
