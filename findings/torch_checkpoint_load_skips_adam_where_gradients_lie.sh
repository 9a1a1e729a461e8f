#!/usr/bin/env bash
# torch 2.13.0 on the CPU (one process), torch.distributed.checkpoint, PyPI.
#
# Expected: get_state_dict(model, optimizer), dcp.load and set_state_dict, the way of PyTorch's own recipe, give a new AdamW
#   the moments and step counts of the checkpoint, or say that they could not.
# Seen: if any parameter has a gradient at that moment, be it of zeros (a warm-up pass before the load, to compile,
#   to find the memory or the batch size, followed by zero_grad(set_to_none=False) or by none), the new optimizer's state
#   stays empty: get_state_dict leaves the moments out of what is to be loaded, dcp.load then loads weights and learning
#   rates alone, and set_state_dict takes the empty state as it is. Nothing raises or warns, strict or not. The run goes on
#   with moments of 0 and its step count starts again, so that the first updates are as large as those of a new run.
# Output seen:
#   loaded                                    moments  steps after 3 more  away from the run without a stop
#   into a new optimizer                            2                   6  0.0000
#   after backward and zero_grad()                  2                   6  0.0000
#   after backward and zero_grad(False)             0                   3  0.1949
#   after backward alone                            0                   3  0.1949
# Setting all gradients to None before get_state_dict avoids it.
#
# Exits with 0 if that is so, with another status if it has changed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 numpy 2> "$work/errors" || { cat "$work/errors"; exit 1; }
cat > "$work/resume.py" <<'PY'
import sys
import warnings

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

folder = sys.argv[1]


def new():
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 4)
    return model, torch.optim.AdamW(model.parameters(), lr=0.1)


def train(model, optimizer, steps):
    for seed in steps:
        rows = torch.randn(8, 4, generator=torch.Generator().manual_seed(seed))
        optimizer.zero_grad()
        model(rows).square().mean().backward()
        optimizer.step()


def resumed(before):
    model, optimizer = new()
    before(model, optimizer)
    weights, state = get_state_dict(model, optimizer)
    found = {"model": weights, "optimizer": state}
    dcp.load(found, checkpoint_id=folder, no_dist=True)
    set_state_dict(model, optimizer, model_state_dict=found["model"], optim_state_dict=found["optimizer"])
    moments = len(optimizer.state)
    train(model, optimizer, range(3, 6))
    (steps,) = {int(state["step"]) for state in optimizer.state.values()}
    return moments, steps, (model.weight - whole.weight).abs().max().item()


def warm_up(set_to_none=None):
    def run(model, optimizer):
        model(torch.ones(2, 4)).sum().backward()
        if set_to_none is not None:
            optimizer.zero_grad(set_to_none=set_to_none)

    return run


whole, optimizer = new()
train(whole, optimizer, range(6))
model, optimizer = new()
train(model, optimizer, range(3))
dcp.save(dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True)), checkpoint_id=folder, no_dist=True)
cases = {
    "into a new optimizer": (lambda model, optimizer: None, True),
    "after backward and zero_grad()": (warm_up(True), True),
    "after backward and zero_grad(False)": (warm_up(False), False),
    "after backward alone": (warm_up(), False),
}
print(f"{'loaded':40}  moments  steps after 3 more  away from the run without a stop")
as_described = True
with warnings.catch_warnings(record=True) as said:
    for name, (before, works) in cases.items():
        moments, steps, away = resumed(before)
        print(f"{name:40}  {moments:7}  {steps:18}  {away:.4f}")
        as_described &= (moments, steps) == ((2, 6) if works else (0, 3)) and (away < 1e-6) == works
as_described &= not any("optim" in str(warning.message).lower() for warning in said)
sys.exit(0 if as_described else 1)
PY
"$work/venv/bin/python" -W ignore "$work/resume.py" "$work/saved" 2> "$work/errors" || { tail -5 "$work/errors"; exit 1; }
