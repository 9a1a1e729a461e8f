#!/usr/bin/env bash
# trl 1.16.0, peft 0.21.2, transformers 5.24.0, datasets 5.2.0, torch 2.13.0 on the CPU (one process), PyPI.
#
# Guess before trying: PiSSA and OLoRA take out of the base weights what the adapter starts with. trl's trainers disable the
#   adapter where they need the reference, which leaves the base without that part.
# Expected: DPOTrainer, GRPOTrainer and others, given a model and a peft_config and no reference model, hold the policy close
#   to the model that was given, whatever init_lora_weights is. Before the first update policy and reference are one: the
#   loss of DPO is log 2 = 0.693, the divergence (KL) in GRPO 0.
# Seen: so it is with LoRA's own initialisation. With "pissa" and "olora", which leave the model as it is as long as the
#   adapter is on, the reference is the base less the main directions of its weights, a damaged model that nobody chose:
#   DPO starts anywhere, with margins and rewards that belong to that damage, and GRPO's penalty draws the policy
#   towards it and away from the model it was meant to stay close to. Nothing warns.
# Output seen (DPO's loss of the first batch with a peft_config, with a model of get_peft_model(), with a peft_config and
# a ref_model; GRPO's KL of the first batch with a peft_config; how far the logits with the adapter disabled are from the
# model's, in their standard deviation; random weights, which no few directions stand for):
#          peft_config   PeftModel   ref_model   GRPO's KL    disabled
#   LoRA         0.693       0.693       0.693       0.000       0.000
#   PiSSA        0.904       0.693       0.693       0.920       5.199
#   OLoRA        0.845       0.693       0.693       0.923       5.060
# Giving DPOTrainer a ref_model, or a model of get_peft_model(), of whose adapter it keeps a copy, avoids it.
#
# Exits with 0 if that is so, with another status if it has changed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 trl==1.16.0 peft==0.21.2 transformers==5.24.0 datasets==5.2.0 \
  accelerate==1.15.0 numpy 2> "$work/errors" || { cat "$work/errors"; exit 1; }
cat > "$work/reference.py" <<'PY'
import copy
import math
import random
import sys
from tempfile import TemporaryDirectory

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer

WORDS = [f"w{number}" for number in range(60)]
VOCABULARY = {word: number for number, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *WORDS])}
SIZE = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "initializer_range": 0.2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
words = Tokenizer(models.WordLevel(VOCABULARY, unk_token="<unk>"))
words.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
)
random.seed(0)
texts = [" ".join(random.choices(WORDS, k=6)) for _ in range(24)]
pairs = Dataset.from_dict({"prompt": texts[:8], "chosen": texts[8:16], "rejected": texts[16:]})
common = {
    "max_steps": 1, "logging_steps": 1, "per_device_train_batch_size": 8, "report_to": [], "use_cpu": True, "bf16": False,
    "disable_tqdm": True, "learning_rate": 1e-4, "save_strategy": "no",
}  # fmt: skip


def parts(init):
    """A model with random weights, the same each time, and a LoRA that is initialised in a way."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SIZE), dtype=torch.float32)
    return model, LoraConfig(r=4, init_lora_weights=init, target_modules="all-linear", task_type="CAUSAL_LM")


def first_log(trainer):
    trainer.train()
    return trainer.state.log_history[0]


def dpo(init, how):
    """DPO's loss of the first batch, before any update."""
    model, adapter = parts(init)
    more = {"peft_config": adapter}
    if how == "ref_model":
        more["ref_model"] = copy.deepcopy(model)
    elif how == "PeftModel":
        model, more = get_peft_model(model, adapter), {}
    with TemporaryDirectory() as folder:
        settings = DPOConfig(folder, beta=0.1, **common)
        trainer = DPOTrainer(model, args=settings, train_dataset=pairs, processing_class=tokenizer, **more)
        return float(first_log(trainer)["loss"])


def grpo(init):
    """GRPO's divergence of policy and reference in the first batch, before any update."""
    model, adapter = parts(init)
    with TemporaryDirectory() as folder:
        settings = GRPOConfig(folder, beta=0.1, num_generations=4, max_completion_length=8, **common)
        trainer = GRPOTrainer(
            model, lambda completions, **_: [float(len(text)) for text in completions], args=settings,
            train_dataset=pairs.select_columns("prompt"), processing_class=tokenizer, peft_config=adapter,
        )  # fmt: skip
        return float(first_log(trainer)["kl"])


def logits_apart(init):
    """How far the logits with the adapter disabled are from the base model's, in their standard deviation; the same with
    the adapter."""
    model, adapter = parts(init)
    ids = torch.arange(4, 64)[None]
    with torch.no_grad():
        base = model(ids).logits
        adapted = get_peft_model(model, adapter)
        on = adapted(ids).logits
        with adapted.disable_adapter():
            off = adapted(ids).logits
    return [((found - base).abs().max() / base.std()).item() for found in (on, off)]


head = ("peft_config", "PeftModel", "ref_model", "GRPO's KL", "disabled")
print(f"{'':6} {' '.join(f'{name:>11}' for name in head)}")
as_described = True
for name, init in {"LoRA": True, "PiSSA": "pissa", "OLoRA": "olora"}.items():
    on, off = logits_apart(init)
    losses, divergence = [dpo(init, how) for how in head[:3]], grpo(init)
    print(f"{name:6} {' '.join(f'{number:11.3f}' for number in (*losses, divergence, off))}")
    from_start = [abs(loss - math.log(2)) for loss in losses]
    as_described &= on < 1e-3 and max(from_start[1:]) < 1e-3
    if name == "LoRA":
        as_described &= max(from_start[0], divergence, off) < 1e-3
    else:
        as_described &= from_start[0] > 0.05 and divergence > 0.1 and off > 1
sys.exit(0 if as_described else 1)
PY
export HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error OMP_NUM_THREADS=1
"$work/venv/bin/python" -W ignore "$work/reference.py" 2> "$work/errors" > "$work/seen" \
  || { cat "$work/seen"; tail -5 "$work/errors"; exit 1; }
grep -v '^{' "$work/seen"
