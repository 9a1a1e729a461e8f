#!/usr/bin/env bash
# deepspeed 0.19.8 (PyPI), torch 2.13.0 on the CPU (gloo, one rank, ZeRO stages 1, 2 and 3).
#
# Expected: an engine that loads a universal checkpoint (ds_to_universal, then "checkpoint": {"load_universal": true})
#   holds the model that was saved, as an engine that loads the checkpoint it was made from does; or it says what is
#   missing.
# Seen: only what the optimizer trains comes back. Frozen weights and buffers keep what they were initialised with, with
#   every stage, though the files in the universal folder hold them. load_checkpoint returns the path as after a
#   success, and nothing warns. Universal checkpoints are made to go on with another number of ranks: there a frozen
#   encoder is random again, and a router's bias that is a buffer is 0. (Stages 1 and 2 are converted with
#   --inject_missing_state, without which the tool refuses a model that is not Megatron's.)
# Output seen (saved are 2s, the new engine is made with 1s):
#   stage 1: checkpoint: trained 2, frozen 2, buffer 2; universal: trained 2, frozen 1, buffer 1
#   stage 2: checkpoint: trained 2, frozen 2, buffer 2; universal: trained 2, frozen 1, buffer 1
#   stage 3: checkpoint: trained 2, frozen 2, buffer 2; universal: trained 2, frozen 1, buffer 1
# Loading frozen weights and buffers from a file of one's own before deepspeed.initialize avoids it.
#
# Exits with 0 if that is so, with another status if it has changed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet deepspeed==0.19.8 torch==2.13.0 numpy setuptools \
  2> "$work/errors" || { cat "$work/errors"; exit 1; }
cat > "$work/frozen.py" <<'PY'
import os
import subprocess
import sys

import torch

os.environ.update(MASTER_ADDR="127.0.0.1", RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", DS_ACCELERATOR="cpu")
torch.distributed.init_process_group("gloo", init_method=f"file://{sys.argv[1]}/rendezvous", rank=0, world_size=1)
import deepspeed  # noqa: E402


class Model(torch.nn.Module):
    """A weight that is trained behind one that is not, and a buffer, all filled with `value`."""

    def __init__(self, value):
        super().__init__()
        self.frozen = torch.nn.Linear(4, 4, bias=False).requires_grad_(False)
        self.trained = torch.nn.Linear(4, 4, bias=False)
        self.register_buffer("shift", torch.full((4,), float(value)))
        torch.nn.init.constant_(self.frozen.weight, value)
        torch.nn.init.constant_(self.trained.weight, value)

    def forward(self, x):
        return self.trained(self.frozen(x) + self.shift)


def make_engine(stage, value, universal=False):
    model = Model(value)
    settings = {
        "train_batch_size": 1,
        "zero_optimization": {"stage": stage},
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
        "checkpoint": {"load_universal": universal},
    }
    optimizer = torch.optim.AdamW([model.trained.weight], lr=1e-3, weight_decay=0.0)
    return deepspeed.initialize(model=model, optimizer=optimizer, config=settings)[0]


def save(stage, folder):
    engine = make_engine(stage, 2)
    # One step without gradients: the optimizer's state is there, and the weights stay 2.
    engine.backward(0 * engine(torch.ones(1, 4)).sum())
    engine.step()
    engine.save_checkpoint(folder, tag="step1")
    options = [] if stage == 3 else ["--inject_missing_state"]
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--input_folder", f"{folder}/step1"]
    command += ["--output_folder", f"{folder}/universal", *options]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def loaded(stage, folder, tag):
    engine = make_engine(stage, 1, universal=tag == "universal")
    path, _ = engine.load_checkpoint(folder, tag=tag)
    assert path is not None, "it says that it failed"
    module = engine.module
    with deepspeed.zero.GatheredParameters(list(module.parameters()), enabled=stage == 3):
        return [tensor.mean().item() for tensor in (module.trained.weight, module.frozen.weight, module.shift)]


def text(values):
    return "trained {:g}, frozen {:g}, buffer {:g}".format(*values)


if __name__ == "__main__":
    as_described = True
    for stage in (1, 2, 3):
        folder = f"{sys.argv[1]}/stage{stage}"
        save(stage, folder)
        plain, universal = loaded(stage, folder, "step1"), loaded(stage, folder, "universal")
        print(f"stage {stage}: checkpoint: {text(plain)}; universal: {text(universal)}", flush=True)
        as_described &= plain == [2, 2, 2] and universal == [2, 1, 1]
    torch.distributed.destroy_process_group()
    sys.exit(0 if as_described else 1)
PY
"$work/venv/bin/python" -W ignore "$work/frozen.py" "$work" 2> "$work/errors" | grep '^stage' || { tail -5 "$work/errors"; exit 1; }
