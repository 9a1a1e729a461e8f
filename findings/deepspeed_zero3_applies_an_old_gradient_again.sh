#!/usr/bin/env bash
# deepspeed 0.19.8 (PyPI), torch 2.13.0 on the CPU (gloo, one rank, ZeRO stages 1, 2 and 3).
#
# Expected: a weight that a step does not use (an adapter, a head or an expert of its own for some of the data, an encoder
#   of images in a step of texts) has no gradient there, with every stage: plain SGD leaves it as it is.
# Seen: so it is with stages 1 and 2. Stage 3 applies the gradient of the last step that did use the weight again, in each
#   step that does not. Where gradients are accumulated and a later microbatch of a step is the first to use it, the old
#   gradient is added to the new one. Nothing warns, and the global norm of gradients counts the old ones, too.
# Output seen (by how much SGD at a rate of 1 moves weights a and b; a step uses those named, each with gradient 3):
#   stage 1: b: 0 3, a: 3 0, a: 3 0; accumulated bb: 0 3, ab: 1.5 1.5, ab: 1.5 1.5; 0 * b added: 3 0
#   stage 2: b: 0 3, a: 3 0, a: 3 0; accumulated bb: 0 3, ab: 1.5 1.5, ab: 1.5 1.5; 0 * b added: 3 0
#   stage 3: b: 0 3, a: 3 3, a: 3 3; accumulated bb: 0 3, ab: 1.5 4.5, ab: 1.5 6; 0 * b added: 3 0
# Adding 0 * weight.sum() of what is not used to the loss of the first microbatch avoids it.
#
# Exits with 0 if stage 3 alone does so, with another status if that has changed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet deepspeed==0.19.8 torch==2.13.0 numpy setuptools \
  2> "$work/errors" || { cat "$work/errors"; exit 1; }
cat > "$work/unused.py" <<'PY'
import os
import sys

import torch

os.environ.update(MASTER_ADDR="127.0.0.1", RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", DS_ACCELERATOR="cpu")
torch.distributed.init_process_group("gloo", init_method=f"file://{sys.argv[1]}/rendezvous", rank=0, world_size=1)
import deepspeed  # noqa: E402


class Branches(torch.nn.Module):
    """Two weights of which each call uses one; `touch` also brings the other one in, times 0."""

    def __init__(self):
        super().__init__()
        self.a = torch.nn.Linear(4, 4, bias=False)
        self.b = torch.nn.Linear(4, 4, bias=False)

    def forward(self, x, used, touch):
        loss = getattr(self, used)(x).sum()
        return loss + 0 * (self.a(x).sum() + self.b(x).sum()) if touch else loss


def weights(model, stage):
    found = []
    for weight in (model.a.weight, model.b.weight):
        with deepspeed.zero.GatheredParameters([weight], enabled=stage == 3):
            found.append(weight.detach().clone())
    return found


def moved(stage, steps, touch=False):
    """How far both weights move in each step; a step is the branches that its microbatches use, "ab" for two of them."""
    model = Branches()
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=1.0),
        config={
            "train_micro_batch_size_per_gpu": 3,
            "gradient_accumulation_steps": len(steps[0]),
            "gradient_clipping": 0.0,
            "zero_allow_untested_optimizer": True,
            "zero_optimization": {"stage": stage},
        },
    )
    found = []
    for step in steps:
        before = weights(model, stage)
        for used in step:
            engine.backward(engine(torch.ones(3, 4), used, touch))
            engine.step()
        after = weights(model, stage)
        found.append([round(float((old - new).mean()), 3) for old, new in zip(before, after, strict=True)])
    return found


def text(steps, rows):
    return ", ".join(f"{step}: {a:g} {b:g}" for step, (a, b) in zip(steps, rows, strict=True))


plain, accumulated = ["b", "a", "a"], ["bb", "ab", "ab"]
as_described = True
for stage in (1, 2, 3):
    once, twice, touched = moved(stage, plain), moved(stage, accumulated), moved(stage, ["b", "a"], touch=True)[1]
    print(
        f"stage {stage}: {text(plain, once)}; accumulated {text(accumulated, twice)}; "
        f"0 * b added: {touched[0]:g} {touched[1]:g}",
        flush=True,
    )
    if stage == 3:
        wanted = [[0, 3], [3, 3], [3, 3]], [[0, 3], [1.5, 4.5], [1.5, 6]]
    else:
        wanted = [[0, 3], [3, 0], [3, 0]], [[0, 3], [1.5, 1.5], [1.5, 1.5]]
    as_described &= (once, twice, touched) == (*wanted, [3, 0])
torch.distributed.destroy_process_group()
sys.exit(0 if as_described else 1)
PY
"$work/venv/bin/python" -W ignore "$work/unused.py" "$work" 2> "$work/errors" | grep '^stage' || { tail -5 "$work/errors"; exit 1; }
