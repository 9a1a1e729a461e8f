#!/usr/bin/env bash
# transformers 5.23.0, accelerate 1.15.0 (PyPI), torch 2.13.0 on the CPU (gloo, one and two ranks).
#
# Expected: router_aux_loss_coef weighs the loss that balances the experts against that of the language model, however
#   Trainer cuts a step of the same rows into ranks and microbatches.
# Seen: it weighs the coefficient times ranks times gradient_accumulation_steps. Trainer has the model divide its loss
#   by the tokens of the whole step, adds the microbatches up and multiplies by the ranks; the router's loss, a mean of
#   each microbatch, is inside and is not divided. The language model's part is right in every layout, and nothing
#   warns. With 8 ranks and 16 microbatches a coefficient of 0.001 acts as 0.128. The logged loss grows as well.
# Output seen (the same 8 rows in each step; the router's loss as it weighs in the gradient and in the logged loss):
#   1 rank,  batch 8, accumulation 1: gradient 1.00, logged 1.00
#   1 rank,  batch 2, accumulation 4: gradient 4.00, logged 4.00
#   2 ranks, batch 4, accumulation 1: gradient 2.00, logged 2.00
#   2 ranks, batch 1, accumulation 4: gradient 8.00, logged 8.00
# A coefficient divided by ranks times accumulation avoids it.
#
# Exits with 0 if that is so, with another status if it has changed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet transformers==5.23.0 accelerate==1.15.0 torch==2.13.0 numpy \
  2> "$work/errors" || { cat "$work/errors"; exit 1; }
cat > "$work/step.py" <<'PY'
import sys

import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM, Trainer, TrainingArguments

work, batch, accumulation = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
# Rows that are all the same: the router's loss is the same for one as for eight.
row = torch.randint(3, 64, (16,), generator=torch.Generator().manual_seed(0))
config = dict(
    vocab_size=64, hidden_size=32, intermediate_size=32, moe_intermediate_size=16, num_hidden_layers=2, head_dim=8,
    num_attention_heads=4, num_key_value_heads=2, num_experts=8, num_experts_per_tok=2, initializer_range=0.3,
    output_router_logits=True,
)  # fmt: skip


def one_step(coefficient):
    """The loss that Trainer logs, and the gradient of the routers' weights: how far SGD at a rate of 1 moves them."""
    torch.manual_seed(0)
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**config, router_aux_loss_coef=coefficient))
    gates = [weight for name, weight in model.named_parameters() if name.endswith("mlp.gate.weight")]
    before = torch.stack([gate.detach().clone() for gate in gates])
    arguments = TrainingArguments(
        f"{work}/out", per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation, max_steps=1,
        learning_rate=1.0, optim="sgd", lr_scheduler_type="constant", max_grad_norm=0.0, logging_steps=1, report_to=[],
        save_strategy="no", use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=[dict(input_ids=row, labels=row)] * 8)
    trainer.train()
    return trainer.state.log_history[0]["loss"], before - torch.stack([gate.detach() for gate in gates])


(plain_loss, plain), (loss, both) = one_step(0.0), one_step(1.0)
parts = {"language": (plain_loss, plain), "router": (loss - plain_loss, both - plain)}
torch.save(parts, f"{work}/{batch}_{accumulation}")
PY
cat > "$work/compare.py" <<'PY'
import sys

import torch

LAYOUTS = {(1, 8, 1): 1, (1, 2, 4): 4, (2, 4, 1): 2, (2, 1, 4): 8}
steps = {layout: torch.load(f"{sys.argv[1]}/{layout[1]}_{layout[2]}") for layout in LAYOUTS}
whole_loss, whole_gradient = steps[1, 8, 1]["router"]
as_described = True
for layout, factor in LAYOUTS.items():
    loss, gradient = steps[layout]["router"]
    logged, weighs = loss / whole_loss, (gradient.norm() / whole_gradient.norm()).item()
    ranks = "1 rank, " if layout[0] == 1 else f"{layout[0]} ranks,"
    print(f"{ranks} batch {layout[1]}, accumulation {layout[2]}: gradient {weighs:.2f}, logged {logged:.2f}")
    for mine, one in zip(steps[layout]["language"], steps[1, 8, 1]["language"], strict=True):
        as_described &= torch.allclose(torch.as_tensor(mine), torch.as_tensor(one), rtol=1e-3, atol=1e-4)
    as_described &= torch.allclose(gradient, factor * whole_gradient, rtol=1e-2, atol=1e-3)
    as_described &= abs(logged - factor) < 1e-3
sys.exit(0 if as_described else 1)
PY
export OMP_NUM_THREADS=1 TRANSFORMERS_VERBOSITY=error
for layout in "1 8 1" "1 2 4" "2 4 1" "2 1 4"; do
  read -r ranks batch accumulation <<< "$layout"
  "$work/venv/bin/torchrun" --standalone --nproc-per-node "$ranks" "$work/step.py" "$work" "$batch" "$accumulation" \
    > "$work/log" 2>&1 || { tail -20 "$work/log"; exit 1; }
done
"$work/venv/bin/python" "$work/compare.py" "$work"
