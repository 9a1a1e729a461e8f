#!/usr/bin/env bash
# transformers 5.23.0, accelerate 1.15.0 (PyPI), torch 2.13.0 on the CPU (gloo, two ranks).
#
# Expected: a model trained with DistributedConfig(tp_size=2) and the plan of its own configuration gets the gradients
#   that it gets on one rank, and weights that every rank holds whole stay the same on all.
# Seen: Apertus learns two numbers for the activation of each MLP (xIELU: alpha_p, alpha_n). With tensor parallelism a
#   rank applies them to its own columns only, and the plan has no rule for them: each rank keeps the gradient of its
#   columns. The two are the gradient only when added up, so the ranks' copies move apart from the first step and
#   training takes another course. All other gradients are right, and nothing warns.
#   (q_norm and k_norm, which have the same need, have a rule.)
# Output seen (first layer's alpha_p and its gradient; 20 steps of SGD on 64 tokens):
#   one rank:         gradient 0.0592, after 20 steps 0.1861, loss 1.2847
#   tp_size=2:        gradients 0.0775 and -0.0183, after 20 steps 0.1898 and 0.1963, loss 1.2246; 4 of 27 gradients
#     wrong
#   with such a rule: gradients 0.0592 and 0.0592, after 20 steps 0.1861 and 0.1861, loss 1.2848; 0 of 27 gradients
#     wrong
# The rule tp_plan={"model.layers.*.mlp.act_fn": "replicated_with_grad_allreduce"} avoids it.
#
# Exits with 0 if that is so, with another status if it has changed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet transformers==5.23.0 accelerate==1.15.0 torch==2.13.0 numpy \
  2> "$work/errors" || { cat "$work/errors"; exit 1; }
cat > "$work/train.py" <<'PY'
import sys

import torch
import torch.distributed as dist
from transformers import ApertusConfig, ApertusForCausalLM
from transformers.distributed import DistributedConfig

folder = f"{sys.argv[1]}/model"
dist.init_process_group("gloo")
rank = dist.get_rank()
if rank == 0:
    torch.manual_seed(0)
    config = ApertusConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.2,
    )  # fmt: skip
    ApertusForCausalLM(config).float().save_pretrained(folder)
dist.barrier()
ids = torch.randint(3, 64, (4, 16), generator=torch.Generator().manual_seed(1))


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor.detach().clone()


def train(layout):
    """The gradients of the first step, and alpha_p of the first layer and the loss after 20 steps."""
    model = ApertusForCausalLM.from_pretrained(folder, dtype=torch.float32, distributed_config=layout)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(20):
        optimizer.zero_grad()
        loss = model(ids, labels=ids).loss
        loss.backward()
        if step == 0:
            gradients = {name: whole(weight.grad) for name, weight in model.named_parameters()}
        optimizer.step()
    return gradients, model.model.layers[0].mlp.act_fn.alpha_p.item(), loss.item()


def on_all_ranks(number):
    numbers = [None, None]
    dist.all_gather_object(numbers, number)
    return numbers


def compare(name, layout):
    """Prints a layout's values; the names of weights whose gradient is not one rank's, and what the ranks hold."""
    gradients, alpha, loss = train(layout)
    wrong = {key for key, wanted in one[0].items() if not torch.allclose(gradients[key], wanted, rtol=1e-3, atol=1e-5)}
    parts, alphas = on_all_ranks(gradients[ALPHA].item()), on_all_ranks(alpha)
    if rank == 0:
        print(
            f"{name} gradients {parts[0]:.4f} and {parts[1]:.4f}, after 20 steps {alphas[0]:.4f} and {alphas[1]:.4f}, "
            f"loss {loss:.4f}; {len(wrong)} of {len(gradients)} gradients wrong"
        )
    return wrong, parts, alphas


ALPHA = "model.layers.0.mlp.act_fn.alpha_p"
RULE = {"model.layers.*.mlp.act_fn": "replicated_with_grad_allreduce"}
one = train(None)
if rank == 0:
    print(f"one rank:         gradient {one[0][ALPHA].item():.4f}, after 20 steps {one[1]:.4f}, loss {one[2]:.4f}")
wrong, parts, alphas = compare("tp_size=2:       ", DistributedConfig(tp_size=2))
fixed, _, _ = compare("with such a rule:", DistributedConfig(tp_size=2, tp_plan=RULE))
dist.destroy_process_group()
as_described = (
    wrong == {name for name in one[0] if ".act_fn.alpha_" in name}
    and abs(sum(parts) - one[0][ALPHA].item()) < 1e-4
    and abs(parts[0] - parts[1]) > 1e-2
    and abs(alphas[0] - alphas[1]) > 1e-3
    and not fixed
)
sys.exit(0 if as_described else 1)
PY
export OMP_NUM_THREADS=1 TRANSFORMERS_VERBOSITY=error
"$work/venv/bin/torchrun" --standalone --nproc-per-node 2 "$work/train.py" "$work" 2> "$work/errors" \
  || { tail -20 "$work/errors"; exit 1; }
