#!/usr/bin/env bash
# torch 2.13.0 on the CPU, two ranks over gloo.
#
# Expected: F.cross_entropy of logits and labels that are DTensors sharded over the tokens is the loss of the whole:
#   the mean over all labels that are not ignored (-100), as for plain tensors. Its gradient is that of the number it
#   returns.
# Seen: the value is the mean of the shards' own means, however many labels each of them has, and it is nan as soon as
#   one shard has none, for example only tokens of the prompt. The gradient is right in all cases: it divides by all
#   labels. So training goes well while the logged loss, perplexities and whatever skips steps whose loss is nan are
#   wrong, and nothing warns. Shards of unequal length are refused because of a "biased mean"; unequal numbers of
#   labels are not. nll_loss does the same. (The tracker knows it of class weights, issue 185167, not of ignored
#   labels.)
# Output seen (16 tokens in two shards, labels in the first and in the second; tokens whose gradient differs):
#   mean, 8 and 8: whole 3.6968, DTensor 3.6968, gradient 0
#   mean, 1 and 8: whole 4.7403, DTensor 6.7601, gradient 0
#   mean, 0 and 8: whole 4.1632, DTensor nan, gradient 0
#   sum, 1 and 8: whole 42.6623, DTensor 42.6623, gradient 0
# reduction="sum", divided by the number of labels, avoids it.
#
# Exits with 0 if that is so, with another status if it has changed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 numpy 2> "$work/errors" || { cat "$work/errors"; exit 1; }
cat > "$work/loss.py" <<'PY'
import math
import sys

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn.functional import cross_entropy, log_softmax, nll_loss

dist.init_process_group("gloo")
mesh = init_device_mesh("cpu", (2,))
LOGITS = torch.randn(16, 8, generator=torch.Generator().manual_seed(0)) * 2
TOKENS = torch.randint(0, 8, (16,), generator=torch.Generator().manual_seed(1))


def labels_with(first, second):
    """The tokens as labels, all but the last `first` and `second` ones of the two halves ignored."""
    labels = TOKENS.clone()
    labels[: 8 - first] = -100
    labels[8 : 16 - second] = -100
    return labels


def measure(labels, reduction):
    """The loss of plain tensors and of DTensors, the mean of the halves' means, and how many gradients differ."""
    plain = LOGITS.clone().requires_grad_()
    whole = cross_entropy(plain, labels, reduction=reduction)
    whole.backward()
    logits = distribute_tensor(LOGITS, mesh, [Shard(0)]).requires_grad_()
    split = distribute_tensor(labels, mesh, [Shard(0)])
    loss = cross_entropy(logits, split, reduction=reduction)
    loss.backward()
    value, gradient = loss.detach().full_tensor().item(), logits.grad.full_tensor()
    same = nll_loss(log_softmax(logits.detach(), 1), split, reduction=reduction).full_tensor().item()
    assert math.isclose(same, value, rel_tol=1e-5) or (math.isnan(same) and math.isnan(value))
    halves = [cross_entropy(LOGITS[half], labels[half]).item() for half in (slice(0, 8), slice(8, 16))]
    differ = int((~torch.isclose(gradient, plain.grad, atol=1e-6)).any(dim=1).sum())
    return whole.item(), value, sum(halves) / 2, differ


as_described = True
for first, second, reduction in ((8, 8, "mean"), (1, 8, "mean"), (0, 8, "mean"), (1, 8, "sum")):
    whole, value, of_halves, differ = measure(labels_with(first, second), reduction)
    if dist.get_rank() == 0:
        print(f"{reduction}, {first} and {second}: whole {whole:.4f}, DTensor {value:.4f}, gradient {differ}")
    as_described &= differ == 0
    if reduction == "sum" or first == second:
        as_described &= math.isclose(value, whole, rel_tol=1e-5)
    elif first == 0:
        as_described &= math.isnan(value) and math.isfinite(whole)
    else:
        as_described &= math.isclose(value, of_halves, rel_tol=1e-5) and abs(value - whole) > 0.05
dist.destroy_process_group()
sys.exit(0 if as_described else 1)
PY
export OMP_NUM_THREADS=1
"$work/venv/bin/torchrun" --standalone --nproc-per-node 2 "$work/loss.py" 2> "$work/errors" \
  || { tail -20 "$work/errors"; exit 1; }
