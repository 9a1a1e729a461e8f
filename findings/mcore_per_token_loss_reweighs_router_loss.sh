#!/usr/bin/env bash
# megatron-core 0.16.1 (PyPI), torch 2.13.0 on the CPU.
#
# Expected: moe_aux_loss_coeff weighs the loss that balances the experts against that of the language model, and
#   calculate_per_token_loss only changes how the latter is averaged: over the labels of a step instead of over its
#   microbatches. Where all microbatches have as many labels, both settings give the same gradients.
# Seen: so it is if every token bears loss, with aux_loss and global_aux_loss. The router's loss is multiplied by the
#   tokens of a microbatch, and later everything is divided by the tokens that bear loss (loss_mask). Where prompts are
#   masked the coefficient counts that much more: with a label on each tenth token 0.01 acts as 0.1. seq_aux_loss is in
#   addition divided by the rows of a microbatch: with 4 rows it acts as a quarter, and a change of micro_batch_size
#   changes the training. The language model's gradient is right in every case, and so is the router's loss in the log.
#   Nothing warns. (The tracker knows the rows, pull request 5798, merged in July 2026, not the labels. TransformerEngine
#   is left out: the router asks for a name of it that is missing without it, and the buffers of gradients ask for
#   a GPU's number. The script gives both.)
# Output seen (the router's gradient with calculate_per_token_loss over that without it; rows of 20 tokens):
#   1 row per microbatch, 20 labels per row: aux_loss 1.00, global_aux_loss 1.00, seq_aux_loss 1.00
#   4 rows per microbatch, 20 labels per row: aux_loss 1.00, global_aux_loss 1.00, seq_aux_loss 0.25
#   1 row per microbatch, 2 labels per row: aux_loss 10.00, global_aux_loss 10.00, seq_aux_loss 10.00
#   4 rows per microbatch, 2 labels per row: aux_loss 10.00, global_aux_loss 10.00, seq_aux_loss 2.50
# A coefficient multiplied by labels over tokens, and for seq_aux_loss by the rows of a microbatch, avoids it.
#
# Exits with 0 if that is so, with another status if it has changed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 megatron-core==0.16.1 numpy setuptools \
  2> "$work/errors" || { cat "$work/errors"; exit 1; }
cat > "$work/router.py" <<'PY'
import sys

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.enums import ModelType
from megatron.core.pipeline_parallel.schedules import forward_step_calc_loss
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.moe.router import TopKRouter

moe_utils.te_general_gemm = None
torch.cuda.current_device = lambda: "cpu"
dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}/store", rank=0, world_size=1)
parallel_state.initialize_model_parallel()
LENGTH, ROWS = 20, torch.randint(0, 16, (4, 20), generator=torch.Generator().manual_seed(1))


class Model(MegatronModule):
    """Embedding, router and output layer; the loss of the tokens gives the router no gradient, so its own stands alone."""

    def __init__(self, config):
        super().__init__(config)
        self.model_type = ModelType.encoder_or_decoder
        self.embedding = torch.nn.Embedding(16, 8)
        self.router = TopKRouter(config, ProcessGroupCollection.use_mpu_process_groups())
        self.router.set_layer_number(1)
        self.output = torch.nn.Linear(8, 16)

    def forward(self, tokens):
        hidden = self.embedding(tokens).detach()
        probabilities, _ = self.router(hidden.transpose(0, 1).contiguous())
        return self.output(hidden) + 0 * probabilities.sum()


def gradients(per_token, kind, rows, labels):
    """Router's and output layer's gradients of one step of four rows, made by megatron-core's own functions."""
    torch.manual_seed(0)
    config = TransformerConfig(
        num_layers=1, hidden_size=8, num_attention_heads=1, num_moe_experts=4, moe_router_topk=2,
        moe_router_load_balancing_type=kind, moe_aux_loss_coeff=0.01, calculate_per_token_loss=per_token,
        use_cpu_initialization=True,
    )  # fmt: skip
    model = DistributedDataParallel(config, DistributedDataParallelConfig(), Model(config))
    model.zero_grad_buffer()
    mask = torch.zeros(rows, LENGTH)
    mask[:, LENGTH - labels :] = 1
    count = torch.zeros([], dtype=torch.int)
    microbatches = ROWS.split(rows)
    for tokens in microbatches:

        def loss_func(logits, tokens=tokens):
            losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten(), reduction="none")
            return (losses.view_as(mask) * mask).sum(), mask.sum().int(), {}

        loss, labelled = forward_step_calc_loss(
            model, model(tokens), loss_func, config, None, False, len(microbatches), [], 1, True
        )
        loss.backward()
        count += labelled
    finalize_model_grads([model], count if per_token else None)
    return model.module.router.weight.main_grad.clone(), model.module.output.weight.main_grad.clone()


as_described = True
for rows, labels in ((1, 20), (4, 20), (1, 2), (4, 2)):
    shown = []
    for kind in ("aux_loss", "global_aux_loss", "seq_aux_loss"):
        router, output = gradients(False, kind, rows, labels)
        router_per_token, output_per_token = gradients(True, kind, rows, labels)
        torch.testing.assert_close(output_per_token, output)
        ratio = (router_per_token.norm() / router.norm()).item()
        torch.testing.assert_close(router_per_token, router * ratio, rtol=1e-3, atol=1e-7)
        shown.append(f"{kind} {ratio:.2f}")
        wanted = LENGTH / labels / (rows if kind == "seq_aux_loss" else 1)
        as_described &= abs(ratio / wanted - 1) < 1e-3
    print(f"{rows} row{'s' * (rows > 1)} per microbatch, {labels} labels per row: {', '.join(shown)}")
dist.destroy_process_group()
sys.exit(0 if as_described else 1)
PY
OMP_NUM_THREADS=1 "$work/venv/bin/python" -W ignore "$work/router.py" "$work" 2> "$work/errors" \
  || { tail -5 "$work/errors"; exit 1; }
