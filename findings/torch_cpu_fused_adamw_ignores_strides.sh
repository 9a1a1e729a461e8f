#!/usr/bin/env bash
# torch 2.13.0 on the CPU.
#
# Expected: AdamW(fused=True) makes the same update as AdamW(fused=False), up to rounding, whatever the strides of a
#   parameter and of its gradient are; or it refuses strides that its kernel does not handle.
# Seen: where a gradient has the parameter's shape but other strides (a transposed tensor that a hook or one's own
#   backward assigned), the fused kernel pairs elements by their places in memory: other elements are updated than those
#   that have a gradient, and nothing is said. fused=False and foreach pair them by index.
# Output seen: not fused: elements that moved: [1]; fused: elements that moved: [5]
#
# Exits with 0 if that is so, with another status if it has changed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 numpy
cat > "$work/step.py" <<'PY'
import sys

import torch


def moved(**options):
    """Places, in the order of the matrix, of what one step changes where only element 1 has a gradient."""
    weight = torch.nn.Parameter(torch.ones(5, 7))
    gradient = torch.zeros(5, 7)
    gradient[0, 1] = 1
    weight.grad = gradient.t().contiguous().t()  # the same matrix, column by column in memory
    torch.optim.AdamW([weight], lr=0.1, weight_decay=0.0, **options).step()
    return (weight.detach() != 1).flatten().nonzero().flatten().tolist()


plain, foreach, fused = moved(), moved(foreach=True), moved(fused=True)
print(f"not fused: elements that moved: {plain}; fused: elements that moved: {fused}")
sys.exit(0 if plain == foreach == [1] and fused != [1] else 1)
PY
"$work/venv/bin/python" "$work/step.py"
