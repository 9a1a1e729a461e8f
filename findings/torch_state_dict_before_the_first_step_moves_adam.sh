#!/usr/bin/env bash
# torch 2.13.0 on the CPU (one process), torch.distributed.checkpoint.state_dict, PyPI.
#
# Expected: get_state_dict (get_optimizer_state_dict) reads. A checkpoint of step 0, kept to begin several runs at the
#   same place, leaves the run that saved it as it was.
# Seen: it takes a step of the optimizer with gradients of 0 and a rate of 0, to make the state that it returns, and leaves
#   the state there. The weights stay, but the step count stands at 1: Adam corrects its bias for one step too many, so that
#   the first update is a quarter smaller than that of the same run without the checkpoint, and the two drift apart. A run
#   that starts from the checkpoint has the count, too. RAdam and Adamax lose half of the first update. Nothing warns.
# Output seen:
#   Adam       steps counted before the first: 1  first update 0.744 of the usual, after 3 steps 0.0467 away
#   AdamW      steps counted before the first: 1  first update 0.745 of the usual, after 3 steps 0.0466 away
#   RAdam      steps counted before the first: 1  first update 0.526 of the usual, after 3 steps 0.0333 away
#   Adamax     steps counted before the first: 1  first update 0.526 of the usual, after 3 steps 0.1317 away
#   Muon       steps counted before the first: 0  first update 1.000 of the usual, after 3 steps 0.0000 away
#   SGD        steps counted before the first: 0  first update 1.000 of the usual, after 3 steps 0.0000 away
#   AdamW, its state cleared after the save: first update 1.000 of the usual
# optimizer.state.clear() after such a save, or saving the model alone at step 0, avoids it.
#
# Exits with 0 if that is so, with another status if it has changed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 numpy 2> "$work/errors" || { cat "$work/errors"; exit 1; }
cat > "$work/first.py" <<'PY'
import sys

import torch
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict


def trained(make, save, clear=False):
    """Returns the weights before the first step and after each of three, and the steps counted before the first."""
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 4, bias=False)
    optimizer = make(model.parameters())
    if save:
        get_optimizer_state_dict(model, optimizer)
    if clear:
        optimizer.state.clear()
    counted = [int(state["step"]) for state in optimizer.state.values() if "step" in state]
    weights = [model.weight.detach().clone()]
    for seed in range(3):
        rows = torch.randn(8, 4, generator=torch.Generator().manual_seed(seed))
        optimizer.zero_grad()
        model(rows).square().mean().backward()
        optimizer.step()
        weights.append(model.weight.detach().clone())
    return weights, sum(counted)


def first_update(weights):
    return (weights[1] - weights[0]).norm()


optimizers = {
    "Adam": lambda p: torch.optim.Adam(p, lr=0.1),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.1),
    "RAdam": lambda p: torch.optim.RAdam(p, lr=0.1),
    "Adamax": lambda p: torch.optim.Adamax(p, lr=0.1),
    "Muon": lambda p: torch.optim.Muon(p, lr=0.1),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
}
moved = {}
for name, make in optimizers.items():
    usual, _ = trained(make, save=False)
    saved, counted = trained(make, save=True)
    part = (first_update(saved) / first_update(usual)).item()
    away = (saved[3] - usual[3]).abs().max().item()
    said = f"first update {part:.3f} of the usual, after 3 steps {away:.4f} away"
    print(f"{name:10} steps counted before the first: {counted}  {said}")
    moved[name] = (counted, round(part, 2), away > 1e-3)
usual, _ = trained(optimizers["AdamW"], save=False)
cleared, _ = trained(optimizers["AdamW"], save=True, clear=True)
part = (first_update(cleared) / first_update(usual)).item()
print(f"AdamW, its state cleared after the save: first update {part:.3f} of the usual")
as_described = (
    moved["Adam"] == (1, 0.74, True)
    and moved["AdamW"][0] == 1
    and 0.73 < moved["AdamW"][1] < 0.76
    and moved["RAdam"] == moved["Adamax"] == (1, 0.53, True)
    and moved["Muon"] == moved["SGD"] == (0, 1.0, False)
    and round(part, 3) == 1.0
)
sys.exit(0 if as_described else 1)
PY
"$work/venv/bin/python" -W ignore "$work/first.py" 2> "$work/errors" || { tail -5 "$work/errors"; exit 1; }
