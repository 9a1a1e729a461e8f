#!/usr/bin/env bash
# peft 0.21.2, transformers 5.24.0, torch 2.13.0 on the CPU (one process), PyPI.
#
# Guess before trying: merging goes through the adapted layers one by one, and two of them hold the same weight.
# Expected: in a model whose head is its embedding (tie_word_embeddings), LoraConfig(ensure_weight_tying=True) gives both one
#   adapter. That is what peft's warning about adapters of tied layers asks for, because without it merging may go wrong,
#   and it is the one way in which the merged model can be exact: W + BA for the embedding and for the head.
# Seen: training, saving and reading the adapter are right, the warning is gone, and merge_and_unload() (merge_adapter(), too)
#   adds BA to the shared weight once for the embedding and once for the head: W + 2 BA. What is saved and served after
#   merging is another model than the one trained and evaluated, here hardly better than the base. Nothing warns.
#   modules_to_save and trainable_token_indices merge rightly, and so do untied models.
# Output seen (losses of the base, with the adapter, merged, merged and saved and read again, and merged less one update;
# how many updates lie in the merged embedding; warnings about tied weights):
#   loss                            base adapter  merged   saved    less updates  warned
#   untied, both layers            5.115   0.991   0.991   0.991   3.978    1.00       0
#   tied, as it is                 5.176   2.756   3.988   3.988   4.820    1.00       1
#   tied, ensure_weight_tying      5.176   2.181   4.780   4.780   2.181    2.00       0
# Taking get_delta_weight() of the embedding, kept from before the merge, from the merged weight once, avoids it.
#
# Exits with 0 if that is so, with another status if it has changed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.24.0 peft==0.21.2 numpy \
  2> "$work/errors" || { cat "$work/errors"; exit 1; }
cat > "$work/merge.py" <<'PY'
import sys
import warnings
from tempfile import TemporaryDirectory

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig

SIZE = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
TEXT = torch.randint(3, 96, (4, 24), generator=torch.Generator().manual_seed(1))


def base_model(tied):
    torch.manual_seed(0)
    config = LlamaConfig(tie_word_embeddings=tied, initializer_range=0.2, **SIZE)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


@torch.no_grad()
def loss(model):
    return model(TEXT, labels=TEXT).loss.item()


def trained(tied, options):
    """A model with an adapter trained for thirty steps, and the warnings that making it gave about tied weights."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = get_peft_model(base_model(tied), LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **options))
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=1e-2)
    for _ in range(30):
        model(TEXT, labels=TEXT).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval(), sum("tie" in str(warning.message) for warning in caught)


def saved(model):
    """The loss of a model that is saved and read again."""
    with TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return loss(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval())


def measure(name, tied, options):
    """Losses of the base, of it with the adapter, of the two merged, of that saved and read again, and of it once one
    update is taken from the embedding; how many times the embedding's update lies in the merged weight; and how many
    warnings spoke of tied weights."""
    model, warned = trained(tied, options)
    losses = [loss(base_model(tied)), loss(model)]
    layer = model.get_input_embeddings()
    before, update = layer.weight.detach().clone(), layer.get_delta_weight("default").detach().clone()
    merged = model.merge_and_unload()
    moved = merged.get_input_embeddings().weight.detach() - before
    times = ((moved * update).sum() / update.square().sum()).item()
    assert torch.allclose(moved, times * update, atol=1e-4)
    losses += [loss(merged), saved(merged)]
    with torch.no_grad():
        merged.get_input_embeddings().weight.sub_(update)
    losses.append(loss(merged))
    print(f"{name:28} {' '.join(f'{number:7.3f}' for number in losses)} {times:7.2f} {warned:7}")
    return losses, times, warned


LAYERS = {"target_modules": ["embed_tokens", "q_proj"]}
print(f"{'loss':28} {'base':>7} {'adapter':>7} {'merged':>7} {'saved':>7} {'less':>7} {'updates':>7} {'warned':>7}")
plain, plain_times, _ = measure("untied, both layers", False, {"target_modules": ["embed_tokens", "lm_head", "q_proj"]})
_, _, warned = measure("tied, as it is", True, LAYERS)
tied, tied_times, silent = measure("tied, ensure_weight_tying", True, {**LAYERS, "ensure_weight_tying": True})
as_described = max(plain[1:4]) - min(plain[1:4]) < 1e-3 and abs(plain_times - 1) < 1e-3
as_described &= warned > 0 and silent == 0 and abs(tied_times - 2) < 1e-3
as_described &= tied[2] > tied[1] + 1 and abs(tied[3] - tied[2]) < 1e-3 and tied[1] < tied[0] - 1
as_described &= abs(tied[4] - tied[1]) < 1e-3
sys.exit(0 if as_described else 1)
PY
export HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error OMP_NUM_THREADS=1
"$work/venv/bin/python" -W ignore "$work/merge.py" 2> "$work/errors" || { tail -5 "$work/errors"; exit 1; }
