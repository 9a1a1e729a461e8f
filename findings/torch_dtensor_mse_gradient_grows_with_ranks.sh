#!/usr/bin/env bash
# torch 2.13.0 on the CPU, one, two and four ranks over gloo.
#
# Expected: F.mse_loss of predictions and targets that are DTensors sharded over the batch is the mean over all, as for
#   plain tensors, and its gradient is that of the number it returns. So it is with cross_entropy.
# Seen: the value is right; the gradient is that number's times the number of ranks, because each rank divides by the
#   elements of its own shard. smooth_l1_loss, huber_loss, binary_cross_entropy and soft_margin_loss do the same;
#   l1_loss, kl_div and binary_cross_entropy_with_logits, and any of them written out, are right. Nothing warns, and
#   the log shows the loss that was meant. Adam hides it where this loss is all there is. Beside another one (a value
#   head beside a policy, a distilled layer beside labels) its weight grows with the ranks: 0.5 acts as 4 on eight. Clipping
#   by norm and plain SGD take other steps, too.
# Output seen (16 rows in four shards; one rank has "times 1" everywhere, two have 2 where four have 4):
#   4 ranks, mse_loss: value right, gradient times 4 (smooth_l1, huber, bce, soft_margin: the same)
#   4 ranks, l1: value right, gradient times 1 (kl_div, bce_logits, cross_entropy, mse by hand, mse, sum: the same)
#   4 ranks, both in one loss: policy's gradient times 1, value head's times 4
# reduction="sum" divided by the number of elements, or (prediction - target).square().mean(), avoids it.
#
# Exits with 0 if that is so, with another status if it has changed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 numpy 2> "$work/errors" || { cat "$work/errors"; exit 1; }
cat > "$work/gradient.py" <<'PY'
import sys

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

dist.init_process_group("gloo")
ranks = dist.get_world_size()
mesh = init_device_mesh("cpu", (ranks,))
PREDICTED = torch.randn(16, 4, generator=torch.Generator().manual_seed(0))
WANTED = torch.rand(16, 4, generator=torch.Generator().manual_seed(1))
GROW = {
    "mse_loss": F.mse_loss,
    "smooth_l1": F.smooth_l1_loss,
    "huber": F.huber_loss,
    "bce": lambda predicted, wanted: F.binary_cross_entropy(predicted.sigmoid(), wanted),
    "soft_margin": F.soft_margin_loss,
}
STAY = {
    "l1": F.l1_loss,
    "kl_div": lambda predicted, wanted: F.kl_div(predicted.log_softmax(-1), wanted, reduction="batchmean"),
    "bce_logits": F.binary_cross_entropy_with_logits,
    "cross_entropy": lambda predicted, wanted: F.cross_entropy(predicted, wanted.argmax(-1)),
    "mse by hand": lambda predicted, wanted: (predicted - wanted).square().mean(),
    "mse, sum": lambda predicted, wanted: F.mse_loss(predicted, wanted, reduction="sum") / wanted.numel(),
}


def measure(loss):
    """Whether the value is that of plain tensors, and by what all gradients are larger than theirs."""
    plain = PREDICTED.clone().requires_grad_()
    whole = loss(plain, WANTED)
    whole.backward()
    split = distribute_tensor(PREDICTED, mesh, [Shard(0)]).requires_grad_()
    value = loss(split, distribute_tensor(WANTED, mesh, [Shard(0)]))
    value.backward()
    ratio = (split.grad.full_tensor() / plain.grad).mean()
    torch.testing.assert_close(split.grad.full_tensor(), plain.grad * ratio, atol=1e-6, rtol=1e-4)
    return torch.isclose(value.detach().full_tensor(), whole, rtol=1e-5).item(), round(ratio.item(), 3)


as_described = True
for name, loss in (GROW | STAY).items():
    right, ratio = measure(loss)
    if dist.get_rank() == 0:
        print(f"{ranks} ranks, {name}: value {'right' if right else 'wrong'}, gradient times {ratio:g}")
    as_described &= right and ratio == (ranks if name in GROW else 1)


def both(predicted, wanted):
    """What a policy and its value head have: one loss of each kind, the second one weighed with 0.5."""
    return F.cross_entropy(predicted[:, :3], wanted[:, :3].argmax(-1)) + 0.5 * F.mse_loss(predicted[:, 3], wanted[:, 3])


plain = PREDICTED.clone().requires_grad_()
both(plain, WANTED).backward()
split = distribute_tensor(PREDICTED, mesh, [Shard(0)]).requires_grad_()
both(split, distribute_tensor(WANTED, mesh, [Shard(0)])).backward()
ratio = (split.grad.full_tensor() / plain.grad).reshape(16, 4)
policy, head = ratio[:, :3].mean().item(), ratio[:, 3].mean().item()
if dist.get_rank() == 0:
    print(f"{ranks} ranks, both in one loss: policy's gradient times {policy:.3g}, value head's times {head:.3g}")
as_described &= abs(policy - 1) < 1e-3 and abs(head - ranks) < 1e-3
dist.destroy_process_group()
sys.exit(0 if as_described else 1)
PY
export OMP_NUM_THREADS=1
for ranks in 1 2 4; do
  "$work/venv/bin/torchrun" --standalone --nproc-per-node "$ranks" "$work/gradient.py" 2> "$work/errors" \
    || { tail -20 "$work/errors"; exit 1; }
done
